"""Running a user's model without leaving a trace: snapshots, copies, known warnings."""
