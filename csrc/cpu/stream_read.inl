namespace ssah {
namespace SSAH_ISA {
namespace {

#include "cpu/simd.inl"

}  // namespace

SSAH_TARGET uint64_t stream_read_share(const char* data, int64_t bytes) {
    vl acc[4] = {};  // four independent chains
    int64_t i = 0;
    for (; i + int64_t(sizeof(acc)) <= bytes; i += sizeof(acc)) {
        for (int k = 0; k < 4; ++k) acc[k] ^= load_raw<vl>(data + i + k * sizeof(vl));
    }
    for (; i < bytes; i += sizeof(vl)) acc[0] ^= load_raw<vl>(data + i);
    const vl all = acc[0] ^ acc[1] ^ acc[2] ^ acc[3];
    uint64_t word = 0;
    for (int j = 0; j < lanes<vl>; ++j) word ^= uint64_t(all[j]);
    return word;
}

}  // namespace SSAH_ISA
}  // namespace ssah
