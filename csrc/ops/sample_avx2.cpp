#define BLENDSERVE_USE_AVX2
#include "ops/sample_kernels.h"
