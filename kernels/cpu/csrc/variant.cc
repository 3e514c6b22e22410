// The kernels of one variant. Compiled once for each, with -DELISION_VARIANT=name and the flags of its processors.
#include "attention.h"
#include "cached_attention.h"
#include "gated.h"
#include "linear.h"
#include "match_tokens.h"
#include "mean_heads.h"
#include "merge_tokens.h"
#include "restore_tokens.h"
#include "rms_norm.h"

#define ELISION_TEXT_(x) #x
#define ELISION_TEXT(x) ELISION_TEXT_(x)

namespace elision {
namespace ELISION_VARIANT {

extern const Kernels kernels;
const Kernels kernels = {ELISION_TEXT(ELISION_VARIANT), match, mean, merge, restore, attention, linear, cached, gated, norm};

}  // namespace ELISION_VARIANT
}  // namespace elision
