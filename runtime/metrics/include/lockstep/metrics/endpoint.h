#pragma once

#include <chrono>
#include <memory>
#include <string>

#include <lockstep/metrics/run_meter.h>

namespace lockstep::metrics {

/// Whether `text` is an IPv4 or IPv6 address as --metrics_bind takes it: no name, no port, no brackets.
bool is_address(const std::string& text);

struct EndpointOptions {
  std::string bind = "127.0.0.1";             ///< an address of this host; any but loopback gets a WARNING
  int port = 0;                               ///< 0: any free one, see port()
  std::chrono::milliseconds deadline{2'000};  ///< a connection's whole life
  std::chrono::milliseconds retry{10'000};    ///< between tries to get a port that is taken
};

/// Serves the figures of a run over HTTP: GET and HEAD of /metrics (Prometheus) and /healthz (200, or 503 with the
/// reason). Anything else is refused; nothing can be changed through it.
///
/// One thread of lowest priority, asleep until somebody connects. At most 16 connections at once, requests of 8 KiB,
/// 2 seconds each; when all are taken, whoever connects takes the place of the one that has been there longest, once
/// that has had 100 ms. So clients that never ask cost next to nothing and keep nobody out.
/// A port that cannot be had costs a WARNING, and is tried again.
class Endpoint {
 public:
  /// @param meter outlives this.
  Endpoint(const EndpointOptions& options, const RunMeter& meter);
  ~Endpoint();
  Endpoint(const Endpoint&) = delete;
  Endpoint& operator=(const Endpoint&) = delete;

  int port() const;  ///< where it listens; 0 while it does not

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// The same figures without a port: a file for the textfile collector of Prometheus' node exporter.
///
/// Written every few seconds if something has changed, and a last time at the end; aside as PATH.new and renamed, so
/// that no reader sees half of it. Mode 0644: the collector is another user. Storage that fails costs one WARNING; the
/// thread of its own keeps a slow one from holding up anything but the end.
class TextFile {
 public:
  /// @param path ends with ".prom", else the collector ignores it. @param meter outlives this.
  TextFile(std::string path, const RunMeter& meter, std::chrono::milliseconds interval = std::chrono::seconds(5));
  ~TextFile();
  TextFile(const TextFile&) = delete;
  TextFile& operator=(const TextFile&) = delete;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep::metrics
