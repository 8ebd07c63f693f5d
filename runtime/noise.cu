// The noise of `noise.py` on a GPU: the same bits, and normal numbers that are equal but for the last digit at worst.
//
//     nvcc -ptx -arch=compute_75 -o noise.ptx noise.cu && sed -i 's/^\.version .*/.version 6.3/' noise.ptx
//     sed -i "1i // Made from noise.cu with SHA-256 $(sha256sum < noise.cu | cut -c1-64)" noise.ptx
//
// `noise.ptx` is shipped beside this file, so that nobody needs a compiler: the driver makes code of it for its GPU. It
// uses nothing newer than version 6.3 of the language, the first with Turing, so that older drivers take it, too.
// Compiled by a C++ compiler for the host, the function below is what the tests compare with numpy.

#ifdef __CUDACC__
#define HIGH(a, b) __umul64hi(a, b)
#else
#include <math.h>
#define __device__
#define HIGH(a, b) ((unsigned long long)(((unsigned __int128)(a) * (b)) >> 64))
#endif

typedef unsigned long long u64;

// Philox 4x64 with 10 rounds (Salmon et al., SC 2011), of one block of four words, in place.
static __device__ void philox(u64 key0, u64 key1, u64 c[4]) {
    for (int i = 0; i < 10; ++i) {
        u64 low0 = 0xD2E7470EE14C6C93ULL * c[0], high0 = HIGH(0xD2E7470EE14C6C93ULL, c[0]);
        u64 low1 = 0xCA5A826395121157ULL * c[2], high1 = HIGH(0xCA5A826395121157ULL, c[2]);
        c[0] = high1 ^ c[1] ^ key0;
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ key1;
        c[3] = low0;
        key0 += 0x9E3779B97F4A7C15ULL;
        key1 += 0xBB67AE8584CAA73BULL;
    }
}

// Numbers 4 * block ... 4 * block + 3 of a step's noise, times `scale`; there are `count` in all.
static __device__ void four(float *out, u64 seed, u64 stream, u64 step, u64 count, float scale, u64 block) {
    u64 bits[4] = {block + 1, step, 0, 0};  // numpy counts on before it draws
    philox(seed, stream, bits);
    for (int pair = 0; pair < 2; ++pair) {
        // Box and Muller 1958. The first number is never 0, so that its logarithm is finite.
        double radius = sqrt(-2.0 * log((double)((bits[2 * pair] >> 11) + 1) * 0x1p-53));
        double angle = (double)(bits[2 * pair + 1] >> 11) * (6.283185307179586 * 0x1p-53);
        u64 at = 4 * block + 2 * pair;
        if (at < count) out[at] = (float)(radius * cos(angle)) * scale;
        if (at + 1 < count) out[at + 1] = (float)(radius * sin(angle)) * scale;
    }
}

#ifdef __CUDACC__
extern "C" __global__ void normal(float *out, u64 seed, u64 stream, u64 step, u64 count, float scale) {
    u64 block = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * block < count) four(out, seed, stream, step, count, scale, block);
}
#else
extern "C" void normal(float *out, u64 seed, u64 stream, u64 step, u64 count, float scale) {
    for (u64 block = 0; 4 * block < count; ++block) four(out, seed, stream, step, count, scale, block);
}
#endif
