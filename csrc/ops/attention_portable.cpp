#include "ops/attention_kernels.h"
