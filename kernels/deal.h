// Work that is dealt to threads of this process, piece by piece.
#pragma once

#include <cstdint>

namespace kvq {

void DealPieces(int64_t n, void (*run)(const void* body, int64_t i), const void* body);

// Calls body(0), ..., body(n - 1), each once, n below 2^31, on this thread and on as many others as OpenMP would take, and returns when all
// have returned. Nobody waits for a thread that has no piece: OpenMP's regions end when each of their threads has come, and one whose
// processor somebody else has comes milliseconds late, at every region of a step. Within a piece, and while another thread deals, it is a
// loop. `body` does not throw.
template <typename Body>
void Deal(int64_t n, const Body& body) {
  DealPieces(n, [](const void* of, int64_t i) { (*static_cast<const Body*>(of))(i); }, &body);
}

}  // namespace kvq
