#pragma once

#include "normformer/tensor/thread_pool.h"

#include "ops/cpu/gemm.h"

namespace normformer::ops::cpu {

/// gemm() with c cut into tiles that the pool's threads share. The cut depends on the shape only and never
/// divides k, so the bits do not depend on the number of threads.
template <class In, class Out>
void tiled_gemm(ThreadPool& threads, const GemmShape& shape, const In* a, const In* b, const Out* bias,
                Out* c);

/// out[columns] += sums of the columns of x[rows, columns]; blocks of rows are summed first.
template <class T>
void add_column_sums(ThreadPool& threads, int64_t rows, int64_t columns, const T* x, Accumulator<T>* out);

}  // namespace normformer::ops::cpu
