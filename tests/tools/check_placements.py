#!/usr/bin/env python3
"""Shows that tensor-parallel mistakes do not compile.

    check_placements.py COMPILER INCLUDE_DIR

Each mistake is one line put into a function that compiles without it; it must be refused, and because of a placement.
"""
import subprocess
import sys

TEMPLATE = """
#include "normformer/model/attention_block.h"
#include "normformer/tensor_parallel/vocabulary.h"
using namespace normformer;
void use(Context& context, const Group& group, const ColumnParallelLinear& column, const RowParallelLinear& row,
         const StreamBoundary<Replicated>& boundary, const AttentionBlock<Replicated>& block, const MicroBatch& batch,
         AttentionBlock<Replicated>::Saved& saved, const VocabularyRows& rows, const Placed<Replicated>& stream,
         const StreamBoundary<SequenceSharded>& doors, const AttentionBlock<SequenceSharded>& split,
         AttentionBlock<SequenceSharded>::Saved& split_saved, const Placed<SequenceSharded>& own) {
  const Placed<FeatureSharded> features = column.forward(stream);
  const Placed<Partial> terms = row.forward(features);
  const Placed<Replicated> whole = boundary.leave(terms);
  const Placed<Partial> dterms = column.backward_input(features);
  const Tensor tensor;
  LossOptions options;
  %s
  (void)context; (void)group; (void)block; (void)batch; (void)saved; (void)rows; (void)whole; (void)dterms;
  (void)doors; (void)split; (void)split_saved; (void)own;
}
"""

CORRECT = {
    "nothing wrong": "",
    "a reduced gradient goes on": "block.forward(batch, {boundary.enter_backward(dterms), whole, {}}, saved);",
    "own tokens gathered for a product": "column.forward(doors.enter(own, 8));",
    "a product scattered to a stream of own tokens": "split.forward(batch, {doors.leave(terms), own, {}}, split_saved);",
    "own tokens' gradient gathered": "row.backward_input(doors.leave_backward(own, 8));",
    "a reduced embedding": "block.forward(batch, {reduce_partial(context, group, embed_tokens(context, rows, tensor)), whole, {}}, saved);",
}

MISTAKES = {
    "an unreduced product enters the residual stream": "block.forward(batch, {terms, whole, {}}, saved);",
    "an unreduced product as the stream's LayerNorm": "block.forward(batch, {whole, terms, {}}, saved);",
    "an unreduced input gradient goes on along the stream": "block.backward_input(saved, dterms);",
    "a row-parallel product of a whole input": "row.forward(stream);",
    "a column-parallel product of features": "column.forward(features);",
    "a row-parallel backward of an unreduced gradient": "row.backward_input(terms);",
    "a column-parallel backward of a whole gradient": "column.backward_input(whole);",
    "features enter the residual stream": "block.forward(batch, {features, whole, {}}, saved);",
    "a whole value is reduced once more": "boundary.leave(whole);",
    "an unreduced embedding enters the residual stream": "block.forward(batch, {embed_tokens(context, rows, tensor), whole, {}}, saved);",
    "the loss of unreduced hidden states": "vocabulary_loss(context, group, rows, terms, options);",
    "a placement made of another by assignment": "const Placed<Replicated> wrong = terms; (void)wrong;",
    "a product of own tokens that were not gathered": "column.forward(own);",
    "own tokens' gradient as the gradient of all": "row.backward_input(own);",
    "an unreduced product enters a stream of own tokens": "split.forward(batch, {terms, own, {}}, split_saved);",
    "all tokens enter a stream of own tokens": "split.forward(batch, {whole, own, {}}, split_saved);",
    "own tokens enter a stream of all": "block.forward(batch, {own, whole, {}}, saved);",
    "all tokens are gathered once more": "doors.enter(whole, 8);",
    "a whole value is scattered": "doors.leave(whole);",
    "an unreduced input gradient goes on along own tokens": "split.backward_input(split_saved, dterms);",
    "the loss of own tokens alone": "vocabulary_loss(context, group, rows, own, options);",
    "the embedding's gradient from own tokens alone": "embed_tokens_backward(context, rows, tensor, own, 1.0);",
    "the loss's unreduced gradient goes on along the stream":
        "block.backward_input(saved, vocabulary_loss(context, group, rows, whole, options).dhidden);",
    "a bare tensor as a stream": "block.forward(batch, {tensor, whole, {}}, saved);",
}


def compile_errors(compiler, include, line):
    run = subprocess.run([compiler, "-std=c++20", "-fsyntax-only", "-I", include, "-x", "c++", "-"],
                         input=TEMPLATE % line, text=True, capture_output=True)
    return None if run.returncode == 0 else run.stderr


def main():
    compiler, include = sys.argv[1:3]
    failed = False
    for name, line in CORRECT.items():
        errors = compile_errors(compiler, include, line)
        if errors is not None:
            failed = True
            print(f"FAILED: does not compile although correct: {name}\n{errors}")
    for name, line in MISTAKES.items():
        errors = compile_errors(compiler, include, line)
        if errors is None:
            failed = True
            print(f"FAILED: compiles: {name}")
        elif "Placed<" not in errors:
            failed = True
            print(f"FAILED: refused for another reason: {name}\n{errors}")
        else:
            print(f"refused as it should be: {name}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
