"""The configuration of a model that normformer has trained: the keys of its [model] section, under the same names."""
from transformers import PretrainedConfig


class NormFormerConfig(PretrainedConfig):
    """What `normformer train --keys` lists under `model.`, with the same defaults; other keys are kept as they are."""

    model_type = "normformer"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "vocab_size": "vocab", "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
        "max_position_embeddings": "length", "intermediate_size": "ffn", "hidden_act": "activation",
        "layer_norm_eps": "norm_eps",
    }

    def __init__(self, layers=4, width=256, heads=4, ffn=0, vocab=1, length=256, head_scale="none",
                 post_attention_norm=False, ffn_norm=False, residual_scale=False, qkv_norm=False, activation="gelu",
                 norm_position="pre", positions="sinusoidal", embedding_scale=True, norm_eps=1e-5,
                 embedding_dropout=0.0, residual_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
                 use_cache=True, **others):
        self.layers = layers
        self.width = width
        self.heads = heads
        self.ffn = ffn or 4 * width
        self.vocab = vocab
        self.length = length
        self.head_scale = head_scale
        self.post_attention_norm = post_attention_norm
        self.ffn_norm = ffn_norm
        self.residual_scale = residual_scale
        self.qkv_norm = qkv_norm
        self.activation = activation
        self.norm_position = norm_position
        self.positions = positions
        self.embedding_scale = embedding_scale
        self.norm_eps = norm_eps
        self.embedding_dropout = embedding_dropout
        self.residual_dropout = residual_dropout
        self.attention_dropout = attention_dropout
        self.activation_dropout = activation_dropout
        self.use_cache = use_cache
        super().__init__(**others)
