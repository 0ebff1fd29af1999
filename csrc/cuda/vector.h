// Elements that are loaded and stored as one.
#pragma once

namespace vitok {

// V elements, a power of two, with the alignment of the widest access that they allow: at most 16 bytes.
template <class T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Vector {
    T element[V];
};

}  // namespace vitok
