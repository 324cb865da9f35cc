#!/bin/sh
# Starts PgBouncer with a user list made from the environment: the password is on no disk.
set -eu
: "${MT5_DATABASE_PASSWORD:?set it to the password of the role mt5}"
umask 077
printf '"mt5" "%s"\n' "$(printf '%s' "$MT5_DATABASE_PASSWORD" | sed 's/"/""/g')" >"${MT5_PGBOUNCER_RUN:-/run/pgbouncer}/userlist.txt"
exec pgbouncer "${1:-/etc/pgbouncer/pgbouncer.ini}"
