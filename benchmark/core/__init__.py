"""The statistics: what is run (specs), how a curve is read (curves), kept (runs, references), judged and shown."""
