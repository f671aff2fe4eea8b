// Compiles to nothing; the targets that own a precompiled header need a source.
