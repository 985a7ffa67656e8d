-- Become the owner of a producer id; whoever published under it before is fenced off.
-- KEYS: producers   ARGV: pid, owner   Returns {last seq, cursor}
redis.call('HSET', KEYS[1], ARGV[1] .. ':owner', ARGV[2])
return {tonumber(redis.call('HGET', KEYS[1], ARGV[1] .. ':seq') or '0'), redis.call('HGET', KEYS[1], ARGV[1] .. ':cursor') or ''}
