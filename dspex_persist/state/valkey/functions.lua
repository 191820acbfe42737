#!lua name=LIBRARY
-- What servers do to the log that they share. Each function is one step: no other command comes in between.
-- A function that fails half-way keeps what it has written. So every check comes before the first write.

local KINDS = {
  XADD = 'stream', HSET = 'hash', HDEL = 'hash', HINCRBY = 'hash', ZADD = 'zset', ZREM = 'zset', RPUSH = 'list',
  UNLINK = 'any',
}

-- Why a command could fail that is to be carried out; nil if it cannot. `seen` has what the commands before it leave.
local function fault_of(command, seen)
  local name, key = command[1], command[2]
  local wanted, kind = KINDS[name], seen[key]
  if not wanted then return 'ERR a log has no command ' .. name end
  if not seen[name .. key] then
    if not redis.acl_check_cmd(unpack(command)) then return 'NOPERM this user may not run ' .. name end
    seen[name .. key] = true
  end
  if wanted == 'any' then return nil end
  if not kind then
    kind = redis.call('TYPE', key).ok
    if kind == 'none' then kind = wanted end
    seen[key] = kind
  end
  if kind ~= wanted then return 'CHANGED ' .. key .. ' is a ' .. kind end
  if name == 'XADD' then
    local number, last = tonumber(string.match(command[3], '^(%d+)-0$')), seen['last' .. key]
    if not last and #redis.call('XRANGE', key, command[3], '+', 'COUNT', 1) > 0 or last and last >= number then
      return 'CHANGED ' .. key .. ' has an entry ' .. command[3] .. ', or later ones'
    end
    seen['last' .. key] = number
  elseif name == 'HINCRBY' then
    local count = redis.call('HGET', key, command[3])
    if count and not (string.match(count, '^-?%d+$') and #count < 18) then
      return 'CHANGED ' .. key .. ' counts ' .. count
    end
  end
  return nil
end

-- The commands in `args` from `place` on: each is how many words it has, then these. Returns them, or why not.
local function commands_in(args, place)
  local commands, seen = {}, {}
  while place <= #args do
    local count = tonumber(args[place])
    local command = {unpack(args, place + 1, place + count)}
    place = place + count + 1
    local fault = fault_of(command, seen)
    if fault then return nil, fault end
    commands[#commands + 1] = command
  end
  return commands, nil
end

-- Delete what an import has left that was not finished.
local function unstage(staged)
  local names = redis.call('SMEMBERS', staged)
  for place = 1, #names, 1000 do
    redis.call('UNLINK', unpack(names, place, math.min(place + 999, #names)))
  end
  if #names > 0 then redis.call('DEL', staged) end
end

-- It is only a hint, and everything is stored by now.
local function tell(news, server) redis.pcall('PUBLISH', news, server) end

-- keys: head, servers, turn, staged, news
-- args: the head's sequence, hash and count of holds as the caller knows them, server, token, "alone" for the end of an
--   import, then commands
local function append(keys, args)
  local found = redis.call('HMGET', keys[1], 'sequence', 'hash', 'holds')
  if (found[1] or '0') ~= args[1] or (found[2] or '') ~= args[2] then return 'moved' end
  local turn, alone = redis.call('GET', keys[3]), args[6] == 'alone'
  -- No hold begins during an import, which nobody wants to repeat because another one has ended.
  if not alone and (found[3] or '') ~= args[3] then return 'moved' end
  if redis.call('HGET', keys[2], args[4]) ~= args[5] then return 'fenced' end
  if alone and turn ~= args[4] then return 'over' end
  if turn and turn ~= args[4] then return 'turn' end
  local commands, fault = commands_in(args, 7)
  if fault then return redis.error_reply(fault) end
  if alone then redis.call('DEL', keys[3], keys[4]) elseif not turn then unstage(keys[4]) end
  for _, command in ipairs(commands) do redis.call(unpack(command)) end
  tell(keys[5], args[4])
  return 'stored'
end

-- Begin an import, once no other server has begun one. keys: servers, turn, staged. args: server, token, milliseconds
local function turn(keys, args)
  if redis.call('HGET', keys[1], args[1]) ~= args[2] then return 'fenced' end
  local owner = redis.call('GET', keys[2])
  if owner and owner ~= args[1] then return 'turn' end
  if not owner then unstage(keys[3]) end
  redis.call('SET', keys[2], args[1], 'PX', args[3])
  return 'begun'
end

-- Write a part of an import, which nobody reads yet. keys: servers, turn, staged.
-- args: server, token, milliseconds, commands
local function stage(keys, args)
  if redis.call('HGET', keys[1], args[1]) ~= args[2] then return 'fenced' end
  if redis.call('GET', keys[2]) ~= args[1] then return 'over' end
  local commands, fault = commands_in(args, 4)
  if fault then return redis.error_reply(fault) end
  redis.call('PEXPIRE', keys[2], args[3])
  for _, command in ipairs(commands) do
    redis.call('SADD', keys[3], command[2])
    redis.call(unpack(command))
  end
  return 'stored'
end

-- Give an import up. keys: turn, staged. args: server
local function release(keys, args)
  local owner = redis.call('GET', keys[1])
  if owner and owner ~= args[1] then return 'turn' end
  unstage(keys[2])
  redis.call('DEL', keys[1])
  return 'released'
end

local function expiry_in(seconds)
  local now = redis.call('TIME')
  return string.format('%.3f', now[1] + now[2] / 1000000 + seconds)
end

local function epoch_of(token) return token and string.match(token, '^%d+') end

-- Holds of sessions: by the session's id, a list of the hold's id, its server and epoch, whether it is full, and the last
-- commit when it began. The head counts how often they have changed.

-- Count a change. With whose it is, so that nobody takes the count for one that the store has lost.
local function count_change(head, id)
  local count = string.match(redis.call('HGET', head, 'holds') or '0', '^%d+') + 1
  redis.call('HSET', head, 'holds', string.format('%d.%s', count, id))
end

-- Forget the holds of leases that have ended. keys: head, servers, holds, news
local function forget(keys, server)
  local found, gone = redis.call('HGETALL', keys[3]), {}
  for place = 1, #found, 2 do
    local hold = cjson.decode(found[place + 1])
    if epoch_of(redis.call('HGET', keys[2], hold[2])) ~= hold[3] then gone[#gone + 1] = found[place] end
  end
  if #gone == 0 then return end
  count_change(keys[1], server)
  redis.call('HDEL', keys[3], unpack(gone))
  tell(keys[4], server)
end

-- The session and the content of a hold; nil if there is none with this id.
local function find_hold(holds, id)
  local found = redis.call('HGETALL', holds)
  for place = 1, #found, 2 do
    local hold = cjson.decode(found[place + 1])
    if hold[1] == id then return found[place], hold end
  end
  return nil
end

-- Have nobody else begin executions in a session. keys: head, servers, holds, news, turn
-- args: server, token, session, the hold's id
local function hold(keys, args)
  if redis.call('HGET', keys[2], args[1]) ~= args[2] then return 'fenced' end
  local turn = redis.call('GET', keys[5])
  if turn and turn ~= args[1] then return 'turn' end
  forget(keys, args[1])
  local found = redis.call('HGET', keys[3], args[3])
  -- It may have been begun by a call whose answer was lost.
  if found then return cjson.decode(found)[1] == args[4] and 'held' or 'other' end
  local since = tonumber(redis.call('HGET', keys[1], 'sequence') or '0')
  count_change(keys[1], args[4])
  redis.call('HSET', keys[3], args[3], cjson.encode({args[4], args[1], epoch_of(args[2]), false, since}))
  tell(keys[4], args[1])
  return 'held'
end

-- Have nobody else write the session. keys: head, servers, holds, news, turn. args: server, the hold's id
local function fill(keys, args)
  local turn = redis.call('GET', keys[5])
  if turn and turn ~= args[1] then return 'turn' end
  forget(keys, args[1])
  local session, found = find_hold(keys[3], args[2])
  if not session then return 'over' end
  found[4] = true
  count_change(keys[1], args[2])
  redis.call('HSET', keys[3], session, cjson.encode(found))
  tell(keys[4], args[1])
  return 'held'
end

-- keys: head, servers, holds, news. args: server, the hold's id
local function unhold(keys, args)
  local session = find_hold(keys[3], args[2])
  if session then
    count_change(keys[1], args[2])
    redis.call('HDEL', keys[3], session)
    tell(keys[4], args[1])
  end
  return 'over'
end

-- Begin a lease; returns its token, which is an epoch that no other lease has, and a number.
-- keys: head, servers, holds, news, leases. args: server, seconds
local function register(keys, args)
  local token = redis.call('HINCRBY', keys[1], 'epochs', 1) .. '.0'
  redis.call('HSET', keys[2], args[1], token)
  redis.call('ZADD', keys[5], expiry_in(args[2]), args[1])
  forget(keys, args[1])
  return token
end

-- keys: servers, leases. args: server, epoch, seconds
local function renew(keys, args)
  if epoch_of(redis.call('HGET', keys[1], args[1])) ~= args[2] then return 'fenced' end
  redis.call('ZADD', keys[2], expiry_in(args[3]), args[1])
  return 'renewed'
end

-- Refuse calls of this server that are still on their way, without an end of its lease. Returns its new token.
-- keys: servers. args: server, epoch
local function settle(keys, args)
  local token = redis.call('HGET', keys[1], args[1])
  if epoch_of(token) ~= args[2] then return 'fenced' end
  local next = args[2] .. '.' .. (tonumber(string.match(token, '%d+$')) + 1)
  redis.call('HSET', keys[1], args[1], next)
  return next
end

-- End the leases of the others that are over. Returns whose. keys: head, servers, holds, news, leases. args: server
local function fence(keys, args)
  local fenced = {}
  for _, server in ipairs(redis.call('ZRANGEBYSCORE', keys[5], '-inf', '(' .. expiry_in(0))) do
    if server ~= args[1] then
      redis.call('HDEL', keys[2], server)
      redis.call('ZREM', keys[5], server)
      fenced[#fenced + 1] = server
    end
  end
  forget(keys, args[1])
  return fenced
end

-- End the lease of this server. keys: head, servers, holds, news, leases, addresses. args: server
local function leave(keys, args)
  redis.call('HDEL', keys[2], args[1])
  redis.call('ZREM', keys[5], args[1])
  redis.call('HDEL', keys[6], args[1])
  forget(keys, args[1])
  return 'left'
end

-- Delete outcomes that are still old. keys: ages, then a hash of outcomes for each. args: before, then for each: the
-- field, and the member of ages
local function reclaim(keys, args)
  for place = 2, #keys do
    local field, member = args[2 * place - 2], args[2 * place - 1]
    local age = redis.call('ZSCORE', keys[1], member)
    if age and tonumber(age) < tonumber(args[1]) then
      redis.call('HDEL', keys[place], field)
      redis.call('ZREM', keys[1], member)
    end
  end
end

-- The current state of a session. keys: live, expiry. args: what the names of its hashes begin with, its id
local function load(keys, args)
  local first = redis.call('HGET', keys[1], args[2])
  if not first then return false end
  return {
    first, redis.call('HGETALL', args[1] .. 's:' .. first), redis.call('HGETALL', args[1] .. 'd:' .. first),
    redis.call('ZSCORE', keys[2], first), redis.call('HLEN', args[1] .. 'n:' .. first),
  }
end

redis.register_function('LIBRARY_append', append)
redis.register_function('LIBRARY_turn', turn)
redis.register_function('LIBRARY_stage', stage)
-- These are small, and have to go on when the memory is full.
redis.register_function{function_name = 'LIBRARY_release', callback = release, flags = {'allow-oom'}}
redis.register_function{function_name = 'LIBRARY_register', callback = register, flags = {'allow-oom'}}
redis.register_function{function_name = 'LIBRARY_renew', callback = renew, flags = {'allow-oom'}}
redis.register_function{function_name = 'LIBRARY_settle', callback = settle, flags = {'allow-oom'}}
redis.register_function{function_name = 'LIBRARY_fence', callback = fence, flags = {'allow-oom'}}
redis.register_function{function_name = 'LIBRARY_leave', callback = leave, flags = {'allow-oom'}}
redis.register_function{function_name = 'LIBRARY_hold', callback = hold, flags = {'allow-oom'}}
redis.register_function{function_name = 'LIBRARY_fill', callback = fill, flags = {'allow-oom'}}
redis.register_function{function_name = 'LIBRARY_unhold', callback = unhold, flags = {'allow-oom'}}
redis.register_function{function_name = 'LIBRARY_reclaim', callback = reclaim, flags = {'allow-oom'}}
redis.register_function{function_name = 'LIBRARY_load', callback = load, flags = {'no-writes'}}
