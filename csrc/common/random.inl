// Random bits for a scalar or a vector of unsigned 32-bit words (U). The includer defines SSAH_FN.

// 32 random bits for the position whose lower half is `position`: Wellons' triple32 (2018), keyed.
template <class U>
SSAH_FN U random_bits(U position, uint64_t key) {
    U x = position ^ uint32_t(key);
    x = (x ^ x >> 17) * 0xed5ad4bbu + uint32_t(key >> 32);
    x = (x ^ x >> 11) * 0xac4c1b51u;
    x = (x ^ x >> 15) * 0x31848babu;
    return x ^ x >> 14;
}
