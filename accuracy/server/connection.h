// What httplib does not do for a connection.
#pragma once

#include <httplib.h>

namespace kvq {

// The socket of the connection that a request came by, which httplib does not hand out: it is the one whose other end is
// the client's. While the request is being answered it stays open, so the number stays its own. -1 where it is not found.
int SocketOf(const httplib::Request& request);

// A client that has closed its sending half alone counts as gone too: httplib would not write to it either. What it sent
// before, and nobody has read, does not hide its end.
bool IsClosed(int socket);

// A connection on which a request's body is left unread ends with the answer: what is left would be read as the next
// request. httplib asks the request alone whether to close; EndConnection does once the answer is written.
void CloseBehind(httplib::Response& response);
void EndConnection(const httplib::Request& request, const httplib::Response& response);

// httplib would cut any answer by the request's ranges, or repeat it for each of thousands.
void ForgetRanges(const httplib::Request& request);

// httplib's server with a queue of the system's that holds more than its five connections.
class HttpServer : public httplib::Server {
 public:
  void WidenBacklog() { ::listen(svr_sock_, 1024); }
};

}  // namespace kvq
