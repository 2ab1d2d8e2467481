#include <algorithm>
#include <numeric>

#include "normformer/evaluation/task_scores.h"
#include "normformer/mesh/layout.h"

#include "python_text.h"

namespace normformer {

namespace {

// Longest first, so that what needs most memory comes first, and micro-batches are of like lengths; dealt out
// so that every replica, which takes samples that lie together, has its share of each length.
std::vector<std::size_t> scoring_order(std::span<const EncodedRequest> requests, int64_t replicas) {
  std::vector<std::size_t> by_length(requests.size());
  std::iota(by_length.begin(), by_length.end(), std::size_t{0});
  std::stable_sort(by_length.begin(), by_length.end(), [&](std::size_t a, std::size_t b) {
    return requests[a].tokens.size() > requests[b].tokens.size();
  });
  std::vector<std::size_t> order;
  const auto step = static_cast<std::size_t>(replicas);
  for (std::size_t replica = 0; replica < step; ++replica) {
    for (std::size_t i = replica; i < by_length.size(); i += step) order.push_back(by_length[i]);
  }
  return order;
}

// Each row reads a request's tokens but the last and predicts those but the first; zeros behind them, which
// nothing before them sees.
Batch batch_of(std::span<const EncodedRequest> requests, std::span<const std::size_t> chosen) {
  std::size_t length = 1;
  for (const std::size_t i : chosen) length = std::max(length, requests[i].tokens.size() - 1);
  Batch batch{.sequences = static_cast<int64_t>(chosen.size()),
              .seq_len = static_cast<int64_t>(length),
              .inputs = {},
              .targets = {},
              .document_start = {},
              .loss_mask = {}};
  for (std::size_t row = 0; row < chosen.size(); ++row) {
    const std::vector<int32_t>& tokens = requests[chosen[row]].tokens;
    batch.inputs.insert(batch.inputs.end(), tokens.begin(), tokens.end() - 1);
    batch.targets.insert(batch.targets.end(), tokens.begin() + 1, tokens.end());
    batch.inputs.resize((row + 1) * length);
    batch.targets.resize((row + 1) * length);
  }
  return batch;
}

// Of one request, whose tokens' scores begin at `row`.
ContinuationScore score_of(const EncodedRequest& request, const double* nll, const double* minus_likeliest) {
  ContinuationScore score{.log_likelihood = 0.0, .is_greedy = true, .tokens = request.continuation};
  const auto targets = static_cast<int64_t>(request.tokens.size()) - 1;
  for (int64_t i = targets - request.continuation; i < targets; ++i) {
    score.log_likelihood -= nll[i];
    score.is_greedy =
        score.is_greedy && request.tokens[static_cast<std::size_t>(i + 1)] == -minus_likeliest[i];
  }
  return score;
}

// Every score was found by one rank; the others have zeros there.
std::vector<ContinuationScore> of_all_ranks(ModelInstance& model, std::span<const EncodedRequest> requests,
                                            const std::vector<ContinuationScore>& mine) {
  std::vector<double> numbers;
  for (const ContinuationScore& score : mine) {
    numbers.push_back(score.log_likelihood);
    numbers.push_back(score.is_greedy ? 1.0 : 0.0);
  }
  Context& context = model.context();
  const Tensor all = from_host<double>(context, numbers, {static_cast<int64_t>(numbers.size())});
  model.mesh().world().all_reduce(context, all, ReduceOp::sum);
  numbers = to_host(all);
  std::vector<ContinuationScore> scores;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    scores.push_back({numbers[2 * i], numbers[2 * i + 1] != 0.0, requests[i].continuation});
  }
  return scores;
}

}  // namespace

EncodedRequest encode_request(BpeEncoder& encoder, const ContinuationRequest& request, int32_t before,
                              int64_t length, const std::string& place) {
  const std::string_view context = strip_end(request.context);
  EncodedRequest encoded;
  encoder.encode(context, encoded.tokens, SpecialText::as_token);
  const std::size_t of_context = encoded.tokens.size();
  encoded.tokens.clear();
  if (context.empty()) encoded.tokens.push_back(before);
  encoder.encode(request.context + request.continuation, encoded.tokens, SpecialText::as_token);
  encoded.continuation =
      static_cast<int64_t>(encoded.tokens.size()) - static_cast<int64_t>(context.empty() ? 1 : of_context);
  if (encoded.continuation < 1) throw DataError(fmt::format("{} has an empty continuation", place));
  if (encoded.continuation > length) {
    throw DataError(fmt::format("{} has a continuation of {} tokens, and the model reads {}", place,
                                encoded.continuation, length));
  }
  const auto most = static_cast<std::size_t>(length) + 1;
  if (encoded.tokens.size() > most)
    encoded.tokens.erase(encoded.tokens.begin(), encoded.tokens.end() - length - 1);
  return encoded;
}

std::vector<ContinuationScore> score_requests(ModelInstance& model, const RunConfig& config,
                                              std::span<const EncodedRequest> requests) {
  const std::vector<std::size_t> order = scoring_order(requests, model.mesh().data().size());
  const auto chosen = [&](int64_t first, int64_t count) {
    return std::span(order).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
  };
  const BatchSource source = [&](int64_t first, int64_t count) {
    return batch_of(requests, chosen(first, count));
  };
  std::vector<ContinuationScore> scores(requests.size());
  const ScoreVisitor keep = [&](int64_t first, const Batch& batch, const TokenScores& found) {
    const std::vector<double> nll = to_host(found.nll);
    const std::vector<double> minus_likeliest = to_host(found.minus_likeliest);
    int64_t row = 0;
    for (const std::size_t i : chosen(first, batch.sequences)) {
      scores[i] = score_of(requests[i], nll.data() + row, minus_likeliest.data() + row);
      row += batch.seq_len;
    }
  };
  evaluate(model, config, source, static_cast<int64_t>(requests.size()), keep, {}, Purpose::scoring);
  return of_all_ranks(model, requests, scores);
}

}  // namespace normformer
