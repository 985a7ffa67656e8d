-- A small note in a hash (a heartbeat, how far a consumer is), which a Redis at its maxmemory takes, too.
-- KEYS: hash   ARGV: HSET or HSETNX, field, value
-- Deleting needs no memory, and what follows a write may go beyond maxmemory: a full Redis empties by such notes only.
redis.call('HDEL', KEYS[1], '')
return redis.call(ARGV[1], KEYS[1], ARGV[2], ARGV[3])
