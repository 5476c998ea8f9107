#define BLENDSERVE_USE_AVX2
#include "ops/attention_kernels.h"
