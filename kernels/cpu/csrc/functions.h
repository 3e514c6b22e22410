// Functions of vectors: the same formula for every lane, so that an element's value does not depend on where it stands.
#pragma once
#include "simd.h"

namespace elision {
namespace ELISION_VARIANT {

ELISION_INLINE Vec negated(Vec x) { return sub(set(0.0f), x); }
ELISION_INLINE Vec magnitude(Vec x) { return most(x, negated(x)); }

// 1 / (1 + e^-x): below -88 as at -88.
ELISION_INLINE Vec sigmoid(Vec x) {
  const Vec one = set(1.0f);
  return divide(one, add(one, exponential(least(set(88.0f), negated(x)))));
}

// `below` where x <= bound, `above` where x > bound; of both one must be finite where the other is taken.
// `next` is the float after `bound`. A NaN takes their sum.
ELISION_INLINE Vec choose_above(Vec x, float bound, float next, Vec below, Vec above) {
  return add(unless_below(x, set(bound), above), unless_below(set(next), x, below));
}

// tanh: x p(x^2) up to 0.625, 1 - 2 / (e^2|x| + 1) beyond. p is a Chebyshev fit, 4e-9 off.
ELISION_INLINE Vec hyperbolic_tangent(Vec x) {
  const Vec size = least(set(20.0f), magnitude(x)), square = mul(x, x);
  Vec p = set(-0.005664775360186457f);
  p = fma(p, square, set(0.020595679964736803f));
  p = fma(p, square, set(-0.053722679345692914f));
  p = fma(p, square, set(0.13331150161455232f));
  p = fma(p, square, set(-0.33333261641810263f));
  p = fma(p, square, set(0.9999999961636131f));
  const Vec one = set(1.0f), e = exponential(add(size, size));
  const Vec far = sub(one, divide(set(2.0f), add(e, one)));
  const Vec signed_far = sub(unless_below(x, set(0.0f), far), unless_below(set(0.0f), x, far));
  return choose_above(magnitude(x), 0.625f, 0.62500006f, mul(x, p), signed_far);
}

// erf: 1 - e^-x^2 t p(t) with t = 1 / (1 + 0.4 |x|). p is a Chebyshev fit, 4e-9 off.
ELISION_INLINE Vec error_function(Vec x) {
  const Vec one = set(1.0f), size = magnitude(x);
  const Vec t = divide(one, fma(size, set(0.4f), one));
  Vec p = set(0.07946383011312119f);
  p = fma(p, t, set(-0.4197891447578462f));
  p = fma(p, t, set(0.736445051012089f));
  p = fma(p, t, set(-0.43271429025773267f));
  p = fma(p, t, set(0.44790328717176253f));
  p = fma(p, t, set(0.12432619561299663f));
  p = fma(p, t, set(0.2397053418279128f));
  p = fma(p, t, set(0.2246597267547345f));
  const Vec e = sub(one, mul(mul(p, t), exponential(negated(mul(size, size)))));
  return sub(unless_below(x, set(0.0f), e), unless_below(set(0.0f), x, e));
}

}  // namespace ELISION_VARIANT
}  // namespace elision
