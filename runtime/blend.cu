// What a request with a picture keeps after a step: `canvas.Blend` on a GPU.
//
//     nvcc -ptx -arch=compute_75 -o blend.ptx blend.cu && sed -i 's/^\.version .*/.version 6.3/' blend.ptx
//     sed -i "1i // Made from blend.cu with SHA-256 $(sha256sum < blend.cu | cut -c1-64)" blend.ptx
//
// `blend.ptx` is shipped beside this file, as `noise.ptx` is. Compiled by a C++ compiler for the host, the function
// below is what the tests compare with numpy.

#ifndef __CUDACC__
#define __device__
#endif

typedef unsigned long long u64;

// x <- m x + (1 - m) (picture known + rest noise), for number i. The mask has `cells` numbers, one for all channels;
// without one m is 0, and x need not hold a number yet.
static __device__ void keep(float *x, const float *known, const float *noise, const float *mask, float picture,
                            float rest, u64 cells, u64 i) {
    float kept = picture * known[i] + rest * noise[i];
    float m = mask ? mask[i % cells] : 0.0f;
    x[i] = mask ? m * x[i] + (1.0f - m) * kept : kept;
}

#ifdef __CUDACC__
extern "C" __global__ void blend(float *x, const float *known, const float *noise, const float *mask, float picture,
                                 float rest, u64 cells, u64 count) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) keep(x, known, noise, mask, picture, rest, cells, i);
}
#else
extern "C" void blend(float *x, const float *known, const float *noise, const float *mask, float picture, float rest,
                      u64 cells, u64 count) {
    for (u64 i = 0; i < count; ++i) keep(x, known, noise, mask, picture, rest, cells, i);
}
#endif
