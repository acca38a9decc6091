// The noise of sparse_engine/sampling/noise.py, which defines it: Philox4x32-10 (Salmon et al. 2011), Box-Muller.
// Compiled by NVRTC on the machine that runs it. It includes nothing, and a C++ compiler takes it too.

// The high word of a product is the next round's; the low word takes the place of what it multiplied.
__device__ static void multiply(unsigned factor, unsigned word, unsigned* high, unsigned* low) {
  const unsigned long long product = (unsigned long long)factor * word;
  *high = (unsigned)(product >> 32);
  *low = (unsigned)product;
}

__device__ static void philox4x32_10(unsigned key0, unsigned key1, unsigned c[4]) {
  for (int round = 0; round < 10; ++round) {
    unsigned high0, low0, high1, low1;
    multiply(0xD2511F53u, c[0], &high0, &low0);
    multiply(0xCD9E8D57u, c[2], &high1, &low1);
    c[0] = high1 ^ c[1] ^ key0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key1;
    c[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

__device__ static void box_muller(unsigned radius, unsigned angle, float* pair) {
  const float uniform = (float)((radius >> 8) + 1u) * 5.9604644775390625e-8f;  // 2^-24; in (0, 1], exact
  const float r = sqrtf(-2.0f * logf(uniform));
  const float a = (float)((int)angle >> 8) * 3.745070282923291e-7f;  // pi / 2^23
  pair[0] = r * cosf(a);
  pair[1] = r * sinf(a);
}

// z [images, elements], float32; origin [images, 3]: the seed's low and high word, and the image; draw: one word.
// Seeds, images and draw are read from memory, so that a recorded launch serves any of them. A thread makes up to four
// elements of one image.
extern "C" __global__ void normal(float* z, const unsigned* origin, const unsigned* draw, unsigned elements,
                                  unsigned images) {
  const unsigned counters = elements / 4 + (elements % 4 != 0);
  const unsigned long long thread = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned row = (unsigned)(thread / counters);
  if (row >= images) {
    return;
  }
  const unsigned counter = (unsigned)(thread % counters);
  const unsigned* own = origin + 3ull * row;
  unsigned words[4] = {counter, *draw, own[2], 0u};
  philox4x32_10(own[0], own[1], words);
  float normals[4];
  box_muller(words[0], words[1], normals);
  box_muller(words[2], words[3], normals + 2);
  float* out = z + (unsigned long long)row * elements + 4ull * counter;
  for (unsigned i = 0; i < 4 && 4ull * counter + i < elements; ++i) {
    out[i] = normals[i];
  }
}
