// Work that is dealt to threads of this process, piece by piece.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvq {

void DealPieces(int64_t n, void (*run)(const void* body, int64_t i), const void* body);

// Calls body(0), ..., body(n - 1), each once, n below 2^31, on this thread and on as many others as OpenMP would take, and returns when all
// have returned. Each thread goes through a run of them, as long as the others', and then takes from those. Nobody waits for a thread that
// has no piece: OpenMP's regions end when each of their threads has come, and one whose processor somebody else has comes milliseconds
// late, at every region of a step. Within a piece, and while another thread deals, it is a loop. `body` does not throw.
template <typename Body>
void Deal(int64_t n, const Body& body) {
  DealPieces(n, [](const void* of, int64_t i) { (*static_cast<const Body*>(of))(i); }, &body);
}

// What the pieces of a later deal read, one behind the other: threads ask memory for what is theirs of it, which is idle otherwise while one
// thread prepares work or all compute. Asked for and not read: any address does.
struct Ahead {
  const std::byte* begin;
  int64_t piece, bytes;  // of a piece, above 0; of all
};
// By the thread that deals, between deals. Threads fetch it while they wait for pieces or for each other.
void Announce(const Ahead& ahead);
// Asks for some more 64-byte lines of this thread's run; returns whether there were any.
bool FetchAhead(int lines);

}  // namespace kvq
