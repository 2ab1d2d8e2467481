#pragma once

/// Before a function that a GPU's kernels may call as well; without nvcc it means nothing.
#ifdef __CUDACC__
#define NF_HOST_DEVICE __host__ __device__
#else
#define NF_HOST_DEVICE
#endif
