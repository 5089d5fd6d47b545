// What a block does between its matrix products, a vector of channels at a time. Included after transform.h.

// gelu(x) = x * Phi(x), Phi the normal distribution's, and its derivative, both of float: 1/2 and x times a polynomial in
// x^2 each up to |x| = 5.6, where they are 0 or 1 (times x). Fitted by least squares at Chebyshev's nodes; the errors are
// 1.5e-7 of |x| and 4e-7.
struct Gelu {
    vec value, slope;
};
template <int degree>
INLINE vec polynomial(const Real (&coefficients)[degree + 1], vec v) {
    vec sum = vec{} + coefficients[0];
#pragma GCC unroll 32
    for (int k = 1; k <= degree; k++) sum = sum * v + coefficients[k];
    return sum;
}
INLINE Gelu gelu(vec x) {
    constexpr Real EDGE = 5.6f;
    constexpr Real phi[] = {-0.000326630122f, 0.000860549537f, -0.000646372394f, 0.000744390554f,
                            -0.00283386807f,  0.00540854785f,  -0.00756795732f,  0.0109340615f,
                            -0.0157422572f,   0.0209584635f,   -0.0263146354f,   0.0319673405f,
                            -0.0383452427f,   0.0469810224f,   -0.0630512956f,   0.126259593f};
    constexpr Real derivative[] = {0.00301971964f, -0.00792773264f, 0.00473782696f, -0.00285051879f, 0.0195832815f,
                                   -0.0378062377f, 0.0433209382f,   -0.0519040148f, 0.0663245178f,   -0.0736571245f,
                                   0.071696466f,   -0.0649002623f,  0.0566772647f,  -0.0509709278f,  0.0518082874f,
                                   -0.0642823407f, 0.12641664f};
    vec inside = x > EDGE ? vec{} + EDGE : x;
    inside = inside < -EDGE ? vec{} - EDGE : inside;
    vec v = inside * inside * (2 / (EDGE * EDGE)) - 1;
    return {x * (inside * polynomial<15>(phi, v) + 0.5f), inside * polynomial<16>(derivative, v) + 0.5f};
}

// y = gelu(x + bias)
static TARGET void bias_gelu(const Features *job) {
    Share share(job->threads, job->rows);
    const Real *bias = (const Real *)job->bias;
    for (int64_t row = share.from; row < share.to; row++) {
        const Real *x = (const Real *)job->x + row * job->columns;
        Real *y = (Real *)job->y + row * job->columns;
        int64_t c = 0;
        for (; c + LANES <= job->columns; c += LANES) store(y + c, gelu(load(x + c) + load(bias + c)).value);
        for (; c < job->columns; c++) y[c] = gelu(vec{} + (x[c] + bias[c])).value[0];
    }
}

// y = gelu(x + bias), grad = grad * gelu'(x + bias)
static TARGET void bias_gelu_backward(const Features *job) {
    Share share(job->threads, job->rows);
    const Real *bias = (const Real *)job->bias;
    for (int64_t row = share.from; row < share.to; row++) {
        const Real *x = (const Real *)job->x + row * job->columns;
        Real *y = (Real *)job->y + row * job->columns, *grad = (Real *)job->grad + row * job->columns;
        int64_t c = 0;
        for (; c + LANES <= job->columns; c += LANES) {
            Gelu at = gelu(load(x + c) + load(bias + c));
            store(y + c, at.value);
            store(grad + c, load(grad + c) * at.slope);
        }
        for (; c < job->columns; c++) {
            Gelu at = gelu(vec{} + (x[c] + bias[c]));
            y[c] = at.value[0];
            grad[c] *= at.slope[0];
        }
    }
}

// y = shortcut + scale * gamma * (x + bias), scale one of each row, or 1
static TARGET void residual(const Features *job) {
    Share share(job->threads, job->rows);
    const Real *bias = (const Real *)job->bias, *gamma = (const Real *)job->gamma;
    for (int64_t row = share.from; row < share.to; row++) {
        int64_t start = row * job->columns, c = 0;
        const Real *x = (const Real *)job->x + start, *shortcut = (const Real *)job->shortcut + start;
        Real *y = (Real *)job->y + start, scale = job->scale ? ((const Real *)job->scale)[row] : 1;
        for (; c + LANES <= job->columns; c += LANES)
            store(y + c, load(shortcut + c) + load(gamma + c) * scale * (load(x + c) + load(bias + c)));
        for (; c < job->columns; c++) y[c] = shortcut[c] + gamma[c] * scale * (x[c] + bias[c]);
    }
}
