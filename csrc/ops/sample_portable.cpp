#include "ops/sample_kernels.h"
