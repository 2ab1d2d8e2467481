#pragma once

#include "normformer/tensor/thread_pool.h"

#include "ops/cpu/gemm.h"

namespace normformer::ops::cpu {

/// A whole product over the pool's threads, which share gemm_part(): see there. k may be 0.
template <class In, class Out>
void gemm(ThreadPool& threads, const GemmShape& shape, const In* a, const In* b, const Out* bias, Out* c);

/// out[columns] += sums of the columns of x[rows, columns]; blocks of rows are summed first.
template <class T>
void add_column_sums(ThreadPool& threads, int64_t rows, int64_t columns, const T* x, Accumulator<T>* out);

}  // namespace normformer::ops::cpu
