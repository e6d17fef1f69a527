// 2^f on [0, 1] by a polynomial of degree 5, for `exp2` of every instruction set.
//
// The coefficients minimise the largest relative error with p(0) = 1 held exactly (so that the largest logit of a row
// contributes exactly 1): 8.2e-8 in real arithmetic, 1.4e-7 evaluated in float32.
#pragma once

namespace npd {

constexpr float kExp2Coefficients[6] = {0x1p+0f,         0x1.62e4bap-1f, 0x1.ebdb5cp-3f,
                                        0x1.c91cdp-5f,   0x1.2778dap-7f, 0x1.e97302p-10f};

// Below this, 2^x is not a normal float32; the vector code gives 0.
constexpr float kExp2Underflow = -127.0f;

}  // namespace npd
