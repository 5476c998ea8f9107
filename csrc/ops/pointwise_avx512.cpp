#define BLENDSERVE_USE_AVX512
#include "ops/pointwise_kernels.h"
