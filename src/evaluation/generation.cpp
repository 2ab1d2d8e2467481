#include "normformer/evaluation/generation.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "normformer/mesh/layout.h"

namespace normformer {

namespace {

// Rows of a pass: enough for products at full speed, little beside the model.
constexpr int64_t kPassTokens = 1024;

// Whether a token is less likely than another.
struct IsLessLikely {
  std::span<const double> logits;

  bool operator()(int32_t a, int32_t b) const {
    const double of_a = logits[static_cast<size_t>(a)];
    const double of_b = logits[static_cast<size_t>(b)];
    return of_a != of_b ? of_a < of_b : a > b;
  }
};

// Tokens by how likely they are, found one by one: most draws need few of them.
class LikeliestFirst {
 public:
  explicit LikeliestFirst(std::span<const double> logits) : less_{logits}, left_(logits.size()) {
    std::iota(left_.begin(), left_.end(), 0);
    std::make_heap(left_.begin(), left_.end(), less_);
  }

  /// The token in this place, from 0.
  int32_t at(size_t place) {
    while (found_.size() <= place) {
      std::pop_heap(left_.begin(), left_.end(), less_);
      found_.push_back(left_.back());
      left_.pop_back();
    }
    return found_[place];
  }

  size_t size() const { return less_.logits.size(); }

 private:
  IsLessLikely less_;
  std::vector<int32_t> left_;  // a heap
  std::vector<int32_t> found_;
};

void require_numbers(std::span<const double> logits) {
  const bool numbers = std::none_of(logits.begin(), logits.end(), [](double l) { return std::isnan(l); });
  const double largest = *std::max_element(logits.begin(), logits.end());
  if (!numbers || std::isinf(largest)) {
    throw NumericError(
        "the model's logits are not finite numbers, so no token can be drawn: its training has diverged, or "
        "its precision cannot hold its activations (--set train.precision=fp32)");
  }
}

}  // namespace

int32_t sample_token(std::span<const double> logits, const GenerationOptions& options, RandomStream stream,
                     int64_t position) {
  NF_CHECK(!logits.empty(), "a token is drawn from nothing");
  require_numbers(logits);
  const auto likeliest = std::max_element(logits.begin(), logits.end());
  if (options.temperature <= 0.0) return static_cast<int32_t>(likeliest - logits.begin());
  const auto weight = [&](int64_t id) {
    return std::exp((logits[static_cast<size_t>(id)] - *likeliest) / options.temperature);
  };
  LikeliestFirst tokens(logits);
  const auto cut = static_cast<size_t>(options.top_k);
  const size_t most = options.top_k > 0 ? std::min(cut, tokens.size()) : tokens.size();
  double mass = 0.0;
  for (size_t i = 0; i < most; ++i)
    mass += weight(most < tokens.size() ? tokens.at(i) : static_cast<int64_t>(i));
  if (options.top_p < 1.0) {
    const double enough = options.top_p * mass;
    mass = 0.0;
    for (size_t i = 0; i < most && (i == 0 || mass < enough); ++i) mass += weight(tokens.at(i));
  }
  const double wanted = to_unit_open(stream.words(static_cast<uint64_t>(position))[0]) * mass;
  double sum = 0.0;
  size_t place = 0;
  for (;; ++place) {
    sum += weight(tokens.at(place));
    // Sums in another order may end below the mass by a rounding.
    if (wanted < sum || place + 1 == most) return tokens.at(place);
  }
}

namespace {

// A text that grows.
struct Growing {
  GeneratedText made;
  std::vector<int32_t> tokens;  // the prompt and what was made
  RandomStream stream;
  int64_t cached = 0;  // tokens whose keys and values are kept
  bool finished = false;

  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
};

class Generator {
 public:
  Generator(ModelInstance& model, std::span<const std::vector<int32_t>> prompts,
            const GenerationOptions& options, const GenerationObserver& observer)
      : model_(model),
        options_(options),
        observer_(observer),
        length_(model.environment().config.length),
        replicas_(model.mesh().data().size()) {
    add_texts(prompts);
    const auto count = static_cast<int64_t>(texts_.size());
    slots_ = std::clamp<int64_t>(ceil_div(count, replicas_), 1, options.batch);
    places_.resize(static_cast<size_t>(slots_ * replicas_));
    cache_ = model.make_cache(slots_, cache_capacity());
  }

  std::vector<GeneratedText> run() {
    for (fill_places(); has_work(); fill_places()) step();
    std::vector<GeneratedText> made;
    for (Growing& text : texts_) made.push_back(std::move(text.made));
    return made;
  }

 private:
  // Texts of one replica that go through the model together, and how.
  struct Pass {
    enum class Kind { next, first, window } kind;
    std::vector<int64_t> places;
    int64_t tokens = 0;
  };

  void add_texts(std::span<const std::vector<int32_t>> prompts) {
    const RandomStream stream = RandomStream{options_.seed}.with("generation");
    for (size_t p = 0; p < prompts.size(); ++p) {
      NF_CHECK(!prompts[p].empty(), "prompt {} is empty", p);
      for (int64_t s = 0; s < options_.samples; ++s) {
        texts_.push_back({.made = {.prompt = static_cast<int64_t>(p), .sample = s},
                          .tokens = prompts[p],
                          .stream = stream.with(p).with(static_cast<uint64_t>(s))});
        longest_ = std::max(longest_, texts_.back().size());
      }
    }
  }

  int64_t cache_capacity() const {
    return std::min(length_, std::min(length_, longest_) + std::min(length_, options_.max_tokens));
  }

  // Place p is slot p / replicas of replica p % replicas.
  int64_t replica_of(int64_t place) const { return place % replicas_; }
  int64_t slot_of(int64_t place) const { return place / replicas_; }
  Growing& text_at(int64_t place) { return *places_[static_cast<size_t>(place)]; }

  bool has_work() const {
    return std::any_of(places_.begin(), places_.end(), [](const Growing* text) { return text != nullptr; });
  }

  void fill_places() {
    for (Growing*& place : places_) {
      if (place != nullptr && place->finished) place = nullptr;
      while (place == nullptr && next_ < texts_.size()) {
        Growing& text = texts_[next_++];
        text.finished = options_.max_tokens == 0;
        if (!text.finished) place = &text;
      }
    }
    tell_finished();
  }

  void tell_finished() {
    for (; told_ < texts_.size() && texts_[told_].finished; ++told_) {
      if (!observer_.finished) continue;
      observer_.finished(texts_[told_].made);
      texts_[told_].made.logits = {};  // so much that only texts in work may have them
    }
  }

  typename Pass::Kind kind_of(const Growing& text) const {
    if (text.cached > 0 && text.size() <= length_) return Pass::Kind::next;
    return text.size() < length_ ? Pass::Kind::first : Pass::Kind::window;
  }

  int64_t tokens_of(const Growing& text) const {
    return std::min(length_, text.size()) - (kind_of(text) == Pass::Kind::next ? text.cached : 0);
  }

  // Every rank knows those of all replicas.
  std::vector<Pass> passes_of(int64_t replica) {
    std::vector<Pass> passes;
    for (const auto kind : {Pass::Kind::next, Pass::Kind::first, Pass::Kind::window}) {
      for (int64_t place = replica; place < slots_ * replicas_; place += replicas_) {
        const Growing* text = places_[static_cast<size_t>(place)];
        if (text == nullptr || kind_of(*text) != kind) continue;
        const int64_t tokens = tokens_of(*text);
        if (passes.empty() || passes.back().kind != kind || passes.back().tokens + tokens > kPassTokens)
          passes.push_back({kind, {}, 0});
        passes.back().places.push_back(place);
        passes.back().tokens += tokens;
      }
    }
    return passes;
  }

  // One token for every text in a place.
  void step() {
    const auto passes = passes_of(model_.mesh().data().rank());
    std::vector<MicroBatch> batches;
    for (const Pass& pass : passes) batches.push_back(micro_batch(pass));
    for (int64_t r = 0; r < replicas_; ++r) {
      const size_t of_replica = passes_of(r).size();
      while (batches.size() < of_replica) batches.push_back(empty_micro_batch());
    }
    const auto count = static_cast<int64_t>(batches.size());
    model_.set_micro_batches(batches);
    model_.forward(count);
    std::vector<double> drawn(places_.size(), -1.0);
    if (options_.keep_logits) rows_.assign(places_.size() * vocabulary(), 0.0);
    if (model_.has_last_part()) {
      for (size_t i = 0; i < passes.size(); ++i)
        draw(passes[i], model_.result(static_cast<int64_t>(i)), drawn);
    }
    const std::vector<double> agreed = agree(drawn, ReduceOp::max);
    if (options_.keep_logits) rows_ = agree(rows_, ReduceOp::sum);
    for (size_t place = 0; place < places_.size(); ++place) {
      if (places_[place] != nullptr) append(place, static_cast<int32_t>(agreed[place]));
    }
  }

  MicroBatch empty_micro_batch() const {
    MicroBatch batch;
    batch.purpose = Purpose::generation;
    return batch;
  }

  MicroBatch micro_batch(const Pass& pass) {
    MicroBatch batch = empty_micro_batch();
    batch.sequences = static_cast<int64_t>(pass.places.size());
    batch.length = length_;
    batch.part = SequencePart::whole(length_);
    std::vector<int32_t> tokens;
    std::vector<ContinuedSequence> sequences;
    for (const int64_t place : pass.places) {
      const Growing& text = text_at(place);
      const int64_t count = tokens_of(text);
      tokens.insert(tokens.end(), text.tokens.end() - count, text.tokens.end());
      sequences.push_back({slot_of(place), text.size() - count, count});
    }
    Context& context = model_.context();
    if (model_.has_first_part()) batch.tokens = from_host<int32_t>(context, tokens, {pass.tokens});
    if (pass.kind != Pass::Kind::window)
      batch.continuation = make_continuation(context, *cache_, std::move(sequences));
    return batch;
  }

  // Draws the tokens of a pass from the logits of this rank's rows of the vocabulary. Collective over the
  // tensor group of the last stage.
  void draw(const Pass& pass, const Tensor& logits, std::vector<double>& drawn) {
    Context& context = model_.context();
    const Group& tensor = model_.mesh().tensor();
    const int64_t vocab = model_.environment().config.vocab;
    const int64_t texts = logits.dim(0);
    std::vector<int64_t> counts = shard_sizes(vocab, tensor.size());
    for (int64_t& count : counts) count *= texts;
    const Tensor gathered = context.empty({texts * vocab}, logits.dtype());
    tensor.all_gather(context, logits.view({logits.numel()}), gathered, counts);
    if (!model_.answers_for_loss()) return;
    const std::vector<double> all = to_host(gathered);
    context.threads().parallel_for(texts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t place = pass.places[static_cast<size_t>(i)];
        const Growing& text = text_at(place);
        const std::vector<double> row = row_of(all, texts, i);
        drawn[static_cast<size_t>(place)] =
            sample_token(row, options_, text.stream, static_cast<int64_t>(text.made.tokens.size()));
        if (options_.keep_logits) std::copy(row.begin(), row.end(), row_at(static_cast<size_t>(place)));
      }
    });
  }

  // One text's logits out of those that ranks gave, each of all texts.
  std::vector<double> row_of(const std::vector<double>& all, int64_t texts, int64_t text) const {
    const int64_t ranks = model_.mesh().tensor().size();
    const int64_t vocab = model_.environment().config.vocab;
    std::vector<double> row;
    for (int64_t r = 0; r < ranks; ++r) {
      const Range part = vocabulary_shard(vocab, ranks, r);
      const auto first = all.begin() + part.begin * texts + text * part.size();
      row.insert(row.end(), first, first + part.size());
    }
    return row;
  }

  size_t vocabulary() const { return static_cast<size_t>(model_.environment().config.vocab); }

  // The logits that are kept of the text in this place.
  std::vector<double>::iterator row_at(size_t place) {
    return rows_.begin() + static_cast<ptrdiff_t>(place * vocabulary());
  }

  // What whoever drew a token says of it; all others have what changes nothing.
  std::vector<double> agree(const std::vector<double>& said, ReduceOp op) const {
    Context& context = model_.context();
    const Tensor agreed = from_host<double>(context, said, {static_cast<int64_t>(said.size())});
    model_.mesh().world().all_reduce(context, agreed, op);
    return to_host(agreed);
  }

  void append(size_t place, int32_t token) {
    Growing& text = *places_[place];
    NF_CHECK(token >= 0, "no rank drew a token of prompt {}", text.made.prompt);
    if (kind_of(text) != Pass::Kind::window) text.cached = text.size();
    text.finished = options_.stop && token == *options_.stop;
    if (text.finished) return;
    text.tokens.push_back(token);
    text.made.tokens.push_back(token);
    if (options_.keep_logits) text.made.logits.emplace_back(row_at(place), row_at(place + 1));
    text.finished = static_cast<int64_t>(text.made.tokens.size()) == options_.max_tokens;
    if (observer_.grown) observer_.grown(text.made);
  }

  ModelInstance& model_;
  const GenerationOptions& options_;
  const GenerationObserver& observer_;
  int64_t length_;    // of the model
  int64_t replicas_;  // which share the places
  std::vector<Growing> texts_;
  int64_t longest_ = 0;  // prompt
  size_t next_ = 0;      // the first text that has not had a place
  size_t told_ = 0;      // texts that the observer knows to be finished
  int64_t slots_ = 0;    // places of each replica
  std::vector<Growing*> places_;
  std::optional<KeyValueCache> cache_;
  std::vector<double> rows_;  // logits that are kept, one row for each place
};

}  // namespace

std::vector<GeneratedText> generate(ModelInstance& model, std::span<const std::vector<int32_t>> prompts,
                                    const GenerationOptions& options, const GenerationObserver& observer) {
  NF_CHECK(model.mesh().context().size() == 1, "generation on a mesh that splits sequences");
  NF_CHECK(model.environment().config.attention == AttentionMask::causal,
           "generation by a model that looks ahead");
  NF_CHECK(options.max_tokens >= 0 && options.samples >= 1 && options.batch >= 1,
           "{} tokens, {} samples, {} texts at a time", options.max_tokens, options.samples, options.batch);
  return Generator(model, prompts, options, observer).run();
}

}  // namespace normformer
