"""What every subcomponent of a finished run does on data: the base of interpreting them.

One pass over batches, in shards if there are many, and a merge. `harvests/NAME/tables/` in a run's
folder then holds these tables, for pandas, DuckDB, or anything else that reads parquet:

subcomponents.parquet   one row each
    subcomponent  int32   its number, which all tables share
    module        string  path; `index` (int32) is its place there
    firings       int64   positions at which its causal importance is above `threshold`
    density       double  firings / positions
    mean_ci       double  mean causal importance over all positions

examples.parquet        up to `top_k` rows each: where its importance is largest
    subcomponent, rank    int32   rank 0 is the largest importance
    importance    float
    batch, row, position  int64   batch of the harvest, example in it, place in the sequence
    importances   list<float>     its importances in the window around the position
    center        int32           the position's place in that list
    tokens        list<int32>     the window's tokens (targets that take tokens)
    inputs        list<float>     the example itself (targets that take a vector of features)
  Among equal importances (many are exactly 1) a fixed random order over all positions decides,
  so that examples are drawn from everywhere.

input_tokens.parquet, output_tokens.parquet   (tokens) one row per pair that ever met
    subcomponent, token   int32   the token at the position; the one that the target predicts there
                                  (its likeliest; where it predicts one at every position)
    count         int64   firings at that token
    token_count   int64   positions with that token, firing or not
    pmi           double  log2 of count * positions / (firings * token_count)

cofirings.parquet       one row per pair that ever fired at the same position
    a, b          int32   subcomponents, a < b
    count         int64

tokens.parquet          (text) token int32, text string

harvest.json            run, step, options, positions, and how many batches
"""
