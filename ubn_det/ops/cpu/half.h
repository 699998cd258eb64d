// float16 without the processor's help, by integers.
#pragma once

#include <cstdint>
#include <cstring>

namespace ubn {

inline __attribute__((always_inline)) float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  uint32_t magnitude = bits & 0x7fff;
  float value;
  if (magnitude >= 0x7c00) {  // infinity or NaN
    magnitude = 0x7f800000 | (magnitude & 0x3ff) << 13;
    std::memcpy(&value, &magnitude, 4);
  } else {
    // As a float the exponent is 112 too low, subnormals included: the product is exact.
    magnitude <<= 13;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
  }
  uint32_t result;
  std::memcpy(&result, &value, 4);
  result |= sign;
  std::memcpy(&value, &result, 4);
  return value;
}

inline __attribute__((always_inline)) uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;   // NaN
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (bits < 0x38800000) {
    // Subnormal: adding 0.5 leaves multiples of 2^-24 in the mantissa, rounded to nearest even.
    float shifted;
    std::memcpy(&shifted, &bits, 4);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, 4);
    return sign | uint16_t(bits - 0x3f000000);
  }
  bits += 0xfff + (bits >> 13 & 1);
  return sign | uint16_t((bits - 0x38000000) >> 13);
}

}  // namespace ubn
