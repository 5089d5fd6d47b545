// What a block does between its matrix products, a vector of channels at a time. Included after transform.h.

// x times the normal distribution's Phi(x), of float: a polynomial in x^2 up to |x| = 5.6, where Phi is 0 or 1. Fitted
// by least squares at Chebyshev's nodes; its error is 1.5e-7 of |x|.
INLINE vec gelu(vec x) {
    constexpr float EDGE = 5.6f;
    constexpr float coefficients[] = {-0.000326630122f, 0.000860549537f, -0.000646372394f, 0.000744390554f,
                                      -0.00283386807f,  0.00540854785f,  -0.00756795732f,  0.0109340615f,
                                      -0.0157422572f,   0.0209584635f,   -0.0263146354f,   0.0319673405f,
                                      -0.0383452427f,   0.0469810224f,   -0.0630512956f,   0.126259593f};
    vec inside = x > EDGE ? vec{} + EDGE : x;
    inside = inside < -EDGE ? vec{} - EDGE : inside;
    vec v = inside * inside * (2 / (EDGE * EDGE)) - 1, sum = vec{} + coefficients[0];
#pragma GCC unroll 16
    for (int k = 1; k < 16; k++) sum = sum * v + coefficients[k];
    return x * (inside * sum + 0.5f);
}

// x = gelu(x + bias)
static TARGET void bias_gelu(const Features *job) {
    Share share(job->threads, job->rows);
    const Real *bias = (const Real *)job->bias;
    for (int64_t row = share.from; row < share.to; row++) {
        Real *x = (Real *)job->x + row * job->columns;
        int64_t c = 0;
        for (; c + LANES <= job->columns; c += LANES) store(x + c, gelu(load(x + c) + load(bias + c)));
        for (; c < job->columns; c++) x[c] = gelu(vec{} + (x[c] + bias[c]))[0];
    }
}

// y = shortcut + gamma * (x + bias)
static TARGET void residual(const Features *job) {
    Share share(job->threads, job->rows);
    const Real *bias = (const Real *)job->bias, *gamma = (const Real *)job->gamma;
    for (int64_t row = share.from; row < share.to; row++) {
        int64_t start = row * job->columns, c = 0;
        const Real *x = (const Real *)job->x + start, *shortcut = (const Real *)job->shortcut + start;
        Real *y = (Real *)job->y + start;
        for (; c + LANES <= job->columns; c += LANES)
            store(y + c, load(shortcut + c) + load(gamma + c) * (load(x + c) + load(bias + c)));
        for (; c < job->columns; c++) y[c] = shortcut[c] + gamma[c] * (x[c] + bias[c]);
    }
}
