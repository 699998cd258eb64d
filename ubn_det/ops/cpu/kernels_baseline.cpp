// The kernels for any processor: 16-byte vectors, which x86-64 and 64-bit Arm have.

// -O3 takes twice as long to compile, for processors that are rare.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O2")
#endif

#include "includes.h"

#define UBN_NAMESPACE baseline
#define UBN_TABLE baseline_tasks
#define UBN_REGISTER_BYTES 16
#define UBN_HAS_F16C 0
#define UBN_HAS_AVX512 0
#define UBN_HAS_FLOAT64 1

#include "kernels.inc"
