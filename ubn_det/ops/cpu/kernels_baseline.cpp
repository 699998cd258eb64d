// The kernels for any processor: 16-byte vectors, which x86-64 and 64-bit Arm have.

#include "includes.h"

#define UBN_NAMESPACE baseline
#define UBN_TABLE baseline_tasks
#define UBN_REGISTER_BYTES 16
#define UBN_HAS_F16C 0
#define UBN_HAS_AVX512 0

#include "kernels.inc"
