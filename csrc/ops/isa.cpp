#include "ops/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <ranges>
#include <stdexcept>
#include <string>

namespace blendserve {
namespace {

#if defined(__x86_64__) && !defined(BLENDSERVE_SIMDE)
// CPUID leaf 7.1, EAX bit 4; the compiler's own check came after GCC 12. Its registers are AVX2's.
bool has_avxvnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & (1u << 4)) != 0;
}
#endif

}  // namespace

Isa best_isa() {
  for (const Isa isa : std::views::reverse(kAllIsas)) {
    if (is_supported(isa)) return isa;
  }
  return Isa::kPortable;
}

// The compiler's run-time checks read CPUID and, through XGETBV, whether the operating system saves the registers.
bool is_supported(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return true;
#if defined(__x86_64__)
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(BLENDSERVE_SIMDE)
    case Isa::kAvxVnni:
    case Isa::kAvx512Vnni:
    case Isa::kAvx512Bf16:
      return is_supported(Isa::kAvx2);  // emulated
#else
    case Isa::kAvxVnni:
      return is_supported(Isa::kAvx2) && has_avxvnni();
    case Isa::kAvx512Vnni:
      return is_supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni");
    case Isa::kAvx512Bf16:  // no processor has it without VNNI
      return is_supported(Isa::kAvx512Vnni) && __builtin_cpu_supports("avx512bf16");
#endif
#endif
    default:
      return false;
  }
}

Isa isa_from_name(std::string_view name) {
  std::string names;
  for (const Isa isa : kAllIsas) {
    if (name == isa_name(isa)) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument("unknown instruction set '" + std::string(name) + "'; use one of " + names);
}

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvxVnni:
      return "avxvnni";
    case Isa::kAvx512Vnni:
      return "avx512vnni";
    case Isa::kAvx512Bf16:
      return "avx512bf16";
  }
  return "unknown";
}

}  // namespace blendserve
