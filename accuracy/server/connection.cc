#include "accuracy/server/connection.h"

#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>

namespace kvq {

int SocketOf(const httplib::Request& request) {
  const std::string port = std::to_string(request.remote_port);
  std::error_code none;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd", none)) {
    const int socket = std::atoi(entry.path().filename().c_str());
    sockaddr_storage peer = {};
    socklen_t size = sizeof peer;
    char host[NI_MAXHOST], service[NI_MAXSERV];
    if (::getpeername(socket, reinterpret_cast<sockaddr*>(&peer), &size) != 0) continue;
    if (::getnameinfo(reinterpret_cast<sockaddr*>(&peer), size, host, sizeof host, service, sizeof service,
                      NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
      continue;
    }
    if (request.remote_addr == host && port == service) return socket;
  }
  return -1;
}

bool IsClosed(int socket) {
  if (socket < 0) return false;
  pollfd end = {.fd = socket, .events = POLLRDHUP, .revents = 0};
  return ::poll(&end, 1, 0) > 0 && (end.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0;
}

void CloseBehind(httplib::Response& response) { response.set_header("Connection", "close"); }

void EndConnection(const httplib::Request& request, const httplib::Response& response) {
  if (response.get_header_value("Connection") != "close") return;
  const int socket = SocketOf(request);
  if (socket < 0) return;
  ::shutdown(socket, SHUT_RDWR);
  char unread[4096];
  while (::recv(socket, unread, sizeof unread, MSG_DONTWAIT) > 0) {  // still readable behind the shutdown
  }
}

void ForgetRanges(const httplib::Request& request) { const_cast<httplib::Request&>(request).ranges.clear(); }

}  // namespace kvq
