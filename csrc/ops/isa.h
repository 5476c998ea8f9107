// The instruction sets that kernels are written for, and which of them this processor has.
#pragma once

#include <string_view>

namespace blendserve {

// Instruction sets with their own kernels, in rising order of preference.
// kAvxVnni differs from kAvx2 in int8 products only, kAvx512Vnni also in what works on 16 lanes at a time.
enum class Isa { kPortable, kAvx2, kAvxVnni, kAvx512Vnni, kAvx512Bf16 };
inline constexpr Isa kAllIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512Vnni, Isa::kAvx512Bf16};

Isa best_isa();                       // the best one this processor (and operating system) runs
bool is_supported(Isa isa);           // may its kernels run here?
Isa isa_from_name(std::string_view);  // "portable", "avx2", ...; throws std::invalid_argument
std::string_view isa_name(Isa isa);

}  // namespace blendserve
