// What the kernels need from outside, to be included before the instruction set is chosen.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if UBN_X86
#include <immintrin.h>
#endif

#include "half.h"
#include "kernels.h"
