"""NormFormer (Shleifer, Weston, Ott 2021, arXiv 2110.09456) and its baseline, for Hugging Face's transformers.

Written by `normformer checkpoint export --format huggingface`. Parameters have fairseq's names. Shapes: B sequences, T tokens,
S tokens with those of the cache, D width, H heads, F features of the feed-forward block, V vocabulary.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_normformer import NormFormerConfig

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu_squared": lambda x: F.relu(x).square(),
}
FIRST_SINUSOIDAL_POSITION = 2  # fairseq's table begins behind the padding symbol's index


def sinusoidal(positions, width):
    """fairseq's sinusoidal positions [..., D]: sines in the first half of the channels, cosines in the second."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=positions.device) * -(math.log(10000.0) / (half - 1))
    angles = (positions + FIRST_SINUSOIDAL_POSITION).double().unsqueeze(-1) * exponents.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Attention(nn.Module):
    """Causal self-attention's four products, and the LayerNorms behind three of them."""

    def __init__(self, config):
        super().__init__()
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)
        self.has_norms = config.qkv_norm
        if self.has_norms:
            self.q_ln, self.k_ln, self.v_ln = (nn.LayerNorm(config.width, eps=config.norm_eps) for _ in range(3))

    def queries_keys_values(self, x):
        """Each [B, T, D]."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return (self.q_ln(q), self.k_ln(k), self.v_ln(v)) if self.has_norms else (q, k, v)


class Layer(nn.Module):
    """One layer: attention, then the feed-forward block, each with its LayerNorms and its residual."""

    def __init__(self, config, index):
        super().__init__()
        norm = lambda size: nn.LayerNorm(size, eps=config.norm_eps)  # noqa: E731
        self.config = config
        self.index = index
        self.activation = ACTIVATIONS[config.activation]
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = norm(config.width)
        if config.head_scale != "none":
            self.c_attn = nn.Parameter(torch.ones(config.heads))
        if config.post_attention_norm:
            self.attn_ln = norm(config.width)
        self.final_layer_norm = norm(config.width)
        self.fc1 = nn.Linear(config.width, config.ffn)
        if config.ffn_norm:
            self.ffn_layernorm = norm(config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.width)
        if config.residual_scale:
            self.w_resid = nn.Parameter(torch.ones(config.width))

    def dropout(self, x, probability):
        return F.dropout(x, probability, self.training)

    def split_heads(self, x):
        """[B, T, D] to [B, H, T, D / H]."""
        return x.view(*x.shape[:2], self.config.heads, -1).transpose(1, 2)

    def attend(self, x, mask, cache):
        """Attention of x [B, T, D] to all tokens that mask [B, 1, T, S] lets through, and the head scale."""
        q, k, v = map(self.split_heads, self.self_attn.queries_keys_values(x))
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
        heads = (self.dropout(weights, self.config.attention_dropout) @ v).transpose(1, 2)  # [B, T, H, D / H]
        if self.config.head_scale == "paper":
            heads = heads * self.c_attn[:, None]
        out = self.self_attn.out_proj(heads.reshape(x.shape))
        if self.config.head_scale == "fairseq":
            out = (out.view(heads.shape) * self.c_attn[:, None]).reshape(x.shape)
        return out

    def feed_forward(self, x):
        h = self.dropout(self.activation(self.fc1(x)), self.config.activation_dropout)
        if self.config.ffn_norm:
            h = self.ffn_layernorm(h)
        return self.fc2(h)

    def forward(self, x, mask, cache):
        pre = self.config.norm_position == "pre"
        attended = self.attend(self.self_attn_layer_norm(x) if pre else x, mask, cache)
        if self.config.post_attention_norm:
            attended = self.attn_ln(attended)
        x = x + self.dropout(attended, self.config.residual_dropout)
        if not pre:
            x = self.self_attn_layer_norm(x)
        fed = self.dropout(self.feed_forward(self.final_layer_norm(x) if pre else x), self.config.residual_dropout)
        x = (self.w_resid * x if self.config.residual_scale else x) + fed
        return x if pre else self.final_layer_norm(x)


class Decoder(nn.Module):
    """From tokens to the last layer's output [B, T, D]."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.length, config.width)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.layers))
        if config.norm_position == "pre":
            self.layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, embeddings, positions, mask, cache):
        x = embeddings * math.sqrt(self.config.width) if self.config.embedding_scale else embeddings
        if self.config.positions == "learned":
            x = x + self.embed_positions(positions)
        else:
            x = x + sinusoidal(positions, self.config.width).to(x.dtype)
        x = F.dropout(x, self.config.embedding_dropout, self.training)
        for layer in self.layers:
            x = layer(x, mask, cache)
        return self.layer_norm(x) if self.config.norm_position == "pre" else x


class NormFormerForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model; its logits are products with the token embedding, so that there is no other output matrix."""

    config_class = NormFormerConfig
    base_model_prefix = "decoder"
    _no_split_modules = ["Layer"]

    def __init__(self, config):
        super().__init__(config)
        if config.vocab < 1 or config.width % config.heads != 0:
            raise ValueError(f"vocab = {config.vocab}, or heads = {config.heads} that do not divide width = {config.width}")
        self.decoder = Decoder(config)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0.0, 0.02)
        if isinstance(module, nn.Linear):
            module.bias.data.zero_()

    def get_input_embeddings(self):
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value):
        self.decoder.embed_tokens = value

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, return_dict=None, **unused):
        """Logits [B, T, V]. `attention_mask` [B, S] is 0 at padding; `labels` [B, T] are the input's own tokens, -100 where
        they do not count, and make `loss` the mean over those that do; `past_key_values` is a cache of transformers."""
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        embeddings = self.decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        tokens, device = embeddings.shape[1], embeddings.device
        places = torch.arange(past + tokens, device=device)
        mask = (places[None, :] <= places[past:, None])[None, None]  # [1, 1, T, S]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()
            known = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        else:
            known = places[past:].expand(embeddings.shape[0], -1)
        positions = known if position_ids is None else position_ids
        hidden = self.decoder(embeddings, positions, mask, past_key_values)
        logits = F.linear(hidden, self.decoder.embed_tokens.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(device))
        cache = past_key_values if use_cache else None
        if return_dict is False:
            return tuple(value for value in (loss, logits, cache) if value is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, use_cache=None, **unused):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {"input_ids": input_ids[:, past:], "past_key_values": past_key_values, "attention_mask": attention_mask,
                "use_cache": use_cache}

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        past_key_values.reorder_cache(beam_idx)
        return past_key_values
