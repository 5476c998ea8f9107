#define BLENDSERVE_USE_AVX2
#include "ops/pointwise_kernels.h"
