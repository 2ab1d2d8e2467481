#pragma once

#include <string_view>

#include "normformer/evaluation/task.h"

#include "record.h"

namespace normformer {

/// Makes a task's item of one record of its file. DataError where the record is none of that task's.
using ItemMaker = TaskItem (*)(const Record& record);

/// What makes the items of a known task.
ItemMaker item_maker(std::string_view task);

}  // namespace normformer
