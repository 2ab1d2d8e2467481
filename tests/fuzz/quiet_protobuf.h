#pragma once

#include <google/protobuf/stubs/logging.h>

namespace normformer {

/// protobuf writes a line for every text that is not UTF-8, millions of them here.
inline google::protobuf::LogHandler* const replaced_protobuf_log = google::protobuf::SetLogHandler(nullptr);

}  // namespace normformer
