#pragma once

#include <functional>

#include <CLI/CLI.hpp>

namespace normformer {

/// What the chosen subcommand will do once the command line is read; returns the process' exit code.
using Command = std::function<int(int* argc, char*** argv)>;

// Each adds one subcommand to `app` and, when it is chosen, puts what it does into `chosen`.
void add_prepare_command(CLI::App& app, Command& chosen);
void add_train_command(CLI::App& app, Command& chosen);
void add_eval_command(CLI::App& app, Command& chosen);
void add_eval_tasks_command(CLI::App& app, Command& chosen);
void add_generate_command(CLI::App& app, Command& chosen);
void add_checkpoint_command(CLI::App& app, Command& chosen);
void add_plan_command(CLI::App& app, Command& chosen);
void add_ledger_command(CLI::App& app, Command& chosen);
void add_report_command(CLI::App& app, Command& chosen);

}  // namespace normformer
