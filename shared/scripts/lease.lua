-- Ownership of a partition's stage, by Redis's own clock.
-- KEYS: lease   ARGV: acquire|renew|release, owner or token, ttl ms, uuid
-- acquire -> {1, token} or {0, owner}; renew -> {1, ''} or {0, owner}; release -> {1 or 0, ''}
-- Deleting needs no memory, and what follows a write may go beyond maxmemory: a full Redis still has owners.
redis.call('HDEL', KEYS[1], '')
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local lease = redis.call('HMGET', KEYS[1], 'token', 'expires_ms', 'epoch', 'owner')
if ARGV[1] == 'acquire' then
  if lease[1] and lease[1] ~= '' and tonumber(lease[2]) > now then return {0, lease[4]} end
  local epoch = tonumber(lease[3] or '0') + 1
  local token = epoch .. '-' .. ARGV[4]
  redis.call('HSET', KEYS[1], 'token', token, 'owner', ARGV[2], 'epoch', epoch, 'expires_ms', now + ARGV[3])
  return {1, token}
end
if lease[1] ~= ARGV[2] then return {0, lease[4] or ''} end
if ARGV[1] == 'renew' then
  redis.call('HSET', KEYS[1], 'expires_ms', now + ARGV[3])
else
  redis.call('HSET', KEYS[1], 'token', '', 'expires_ms', now, 'owner', '')
end
return {1, ''}
