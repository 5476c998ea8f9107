#define BLENDSERVE_USE_AVX512
#include "ops/sample_kernels.h"
