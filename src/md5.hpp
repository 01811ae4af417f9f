// MD5 of a stream (RFC 1321), for servers whose own cannot be used by an extension. See compat.hpp.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace migrate {

class Md5 {
public:
    static constexpr size_t kDigest = 16;

    void update(const uint8_t *data, size_t length) {
        size_t used = length_ % kBlock;
        length_ += length;
        while (length > 0) {
            const size_t part = length < kBlock - used ? length : kBlock - used;
            memcpy(block_ + used, data, part);
            data += part, length -= part, used += part;
            if (used == kBlock) add_block(), used = 0;
        }
    }

    void final(uint8_t *digest) {
        const uint64_t bits = length_ * 8;
        const uint8_t padding[kBlock] = {0x80};
        update(padding, 1 + (2 * kBlock - 9 - length_ % kBlock) % kBlock);
        uint8_t size[8];
        for (int i = 0; i < 8; i++) size[i] = static_cast<uint8_t>(bits >> (8 * i));
        update(size, sizeof(size));
        for (size_t i = 0; i < kDigest; i++) digest[i] = static_cast<uint8_t>(state_[i / 4] >> (8 * (i % 4)));
    }

private:
    static constexpr size_t kBlock = 64;
    uint32_t state_[4] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476};
    uint64_t length_ = 0;
    uint8_t block_[kBlock];

    static uint32_t rotate(uint32_t x, int by) { return x << by | x >> (32 - by); }

    uint32_t word(int i) const {
        const uint8_t *b = block_ + 4 * i;
        return b[0] | b[1] << 8 | b[2] << 16 | static_cast<uint32_t>(b[3]) << 24;
    }

    void add_block() {
        uint32_t a = state_[0], b = state_[1], c = state_[2], d = state_[3];
        for (int i = 0; i < 64; i++) {
            const int round = i / 16;
            const uint32_t f = round == 0   ? (b & c) | (~b & d)
                               : round == 1 ? (d & b) | (~d & c)
                               : round == 2 ? b ^ c ^ d
                                            : c ^ (b | ~d);
            const int at = round == 0 ? i : (round == 1 ? 5 * i + 1 : round == 2 ? 3 * i + 5 : 7 * i) % 16;
            const uint32_t turned = b + rotate(a + f + kSines[i] + word(at), kShifts[round][i % 4]);
            a = d, d = c, c = b, b = turned;
        }
        state_[0] += a, state_[1] += b, state_[2] += c, state_[3] += d;
    }

    static constexpr int kShifts[4][4] = {{7, 12, 17, 22}, {5, 9, 14, 20}, {4, 11, 16, 23}, {6, 10, 15, 21}};
    // The whole part of 2^32 times the sine of 1, 2, … 64
    static constexpr uint32_t kSines[64] = {
        0xd76aa478, 0xe8c7b756, 0x242070db, 0xc1bdceee, 0xf57c0faf, 0x4787c62a, 0xa8304613, 0xfd469501,
        0x698098d8, 0x8b44f7af, 0xffff5bb1, 0x895cd7be, 0x6b901122, 0xfd987193, 0xa679438e, 0x49b40821,
        0xf61e2562, 0xc040b340, 0x265e5a51, 0xe9b6c7aa, 0xd62f105d, 0x02441453, 0xd8a1e681, 0xe7d3fbc8,
        0x21e1cde6, 0xc33707d6, 0xf4d50d87, 0x455a14ed, 0xa9e3e905, 0xfcefa3f8, 0x676f02d9, 0x8d2a4c8a,
        0xfffa3942, 0x8771f681, 0x6d9d6122, 0xfde5380c, 0xa4beea44, 0x4bdecfa9, 0xf6bb4b60, 0xbebfbc70,
        0x289b7ec6, 0xeaa127fa, 0xd4ef3085, 0x04881d05, 0xd9d4d039, 0xe6db99e5, 0x1fa27cf8, 0xc4ac5665,
        0xf4292244, 0x432aff97, 0xab9423a7, 0xfc93a039, 0x655b59c3, 0x8f0ccc92, 0xffeff47d, 0x85845dd1,
        0x6fa87e4f, 0xfe2ce6e0, 0xa3014314, 0x4e0811a1, 0xf7537e82, 0xbd3af235, 0x2ad7d2bb, 0xeb86d391};
};

}  // namespace migrate
