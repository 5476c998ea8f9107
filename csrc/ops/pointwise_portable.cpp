#include "ops/pointwise_kernels.h"
