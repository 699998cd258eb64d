// Which kernels run on this processor, and how their tasks run in parallel.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "kernels.h"

namespace ubn {

// Names the instruction set to use, for tests: baseline, avx2 or avx512.
constexpr const char* CAPABILITY_VARIABLE = "UBN_CPU_CAPABILITY";

inline const TypeTasks* choose_tasks() {
  struct Choice {
    std::string name;
    const TypeTasks* tasks;
    bool is_supported;
  };
  // The best comes first.
  std::vector<Choice> choices;
#if UBN_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq");
  choices.push_back({"avx512", avx512_tasks, has_avx512});
  choices.push_back({"avx2", avx2_tasks, has_avx2});
#endif
  choices.push_back({"baseline", baseline_tasks, true});

  const char* value = std::getenv(CAPABILITY_VARIABLE);
  for (const Choice& choice : choices) {
    if (value ? choice.name != value : !choice.is_supported) continue;
    TORCH_CHECK(
        choice.is_supported,
        CAPABILITY_VARIABLE, " asks for ", value, ", which this processor does not have");
    return choice.tasks;
  }
  TORCH_CHECK(
      false, CAPABILITY_VARIABLE, " has to be baseline, avx2 or avx512 and is '", value, "'");
}

inline int type_index(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return int(Type::float32);
    case at::kDouble:
      return int(Type::float64);
    case at::kBFloat16:
      return int(Type::bfloat16);
    default:
      return int(Type::float16);
  }
}

inline const TypeTasks& tasks_of(at::ScalarType dtype) {
  static const TypeTasks* const chosen = choose_tasks();
  return (dtype == at::kDouble ? baseline_tasks : chosen)[type_index(dtype)];
}

// Runs a task on [0, number), `grain` at a time or, where it is 0, as many as fall to a thread.
inline void run(Task task, const Call& call, int64_t number, int64_t grain, int64_t bytes) {
  const int64_t parts = grain ? (number + grain - 1) / grain : number;
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<char> memory;
    if (int64_t(memory.size()) < bytes + 64) memory.resize(bytes + 64);
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory.data());
    void* aligned = reinterpret_cast<void*>((start + 63) / 64 * 64);
    if (!grain) return task(call, begin, end, aligned);
    for (int64_t part = begin; part < end; ++part)
      task(call, part * grain, std::min(number, (part + 1) * grain), aligned);
  });
}

}  // namespace ubn
