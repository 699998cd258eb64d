// The kernels for x86 processors with AVX-512: 64-byte vectors.

#include "includes.h"

#if UBN_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")
#endif

#define UBN_NAMESPACE avx512
#define UBN_TABLE avx512_tasks
#define UBN_REGISTER_BYTES 64
#define UBN_HAS_F16C 1
#define UBN_HAS_AVX512 1
#define UBN_HAS_FLOAT64 0

#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
