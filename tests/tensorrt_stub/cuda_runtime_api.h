// As much of CUDA's header as export/examples/loop.cpp reads, in host memory.
#pragma once
#include <cstdlib>

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
inline cudaError_t cudaMallocManaged(void** data, size_t size) {
    return (*data = std::malloc(size)) ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
