// What CandleCollector.mq5 uses of MQL5, for a C++ compiler: enough of a terminal to run the EA's own lines.
// Strings are UTF-16, as in MQL5; files, indices and error codes behave as its documentation says.
#pragma once
#include <arpa/inet.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef int64_t datetime;

static std::u16string widen(const std::string &in) {
  std::u16string out;
  for (size_t i = 0; i < in.size();) {
    unsigned char c = in[i];
    int n = c < 0x80 ? 0 : c < 0xe0 ? 1 : c < 0xf0 ? 2 : 3;
    uint32_t v = n == 0 ? c : n == 1 ? c & 0x1f : n == 2 ? c & 0x0f : c & 0x07;
    for (i++; n > 0 && i < in.size(); n--, i++) v = (v << 6) | (in[i] & 0x3f);
    if (v >= 0x10000) {
      out.push_back(char16_t(0xd800 + ((v - 0x10000) >> 10)));
      out.push_back(char16_t(0xdc00 + ((v - 0x10000) & 0x3ff)));
    } else out.push_back(char16_t(v));
  }
  return out;
}
static std::string narrow(const std::u16string &in) {
  std::string out;
  for (size_t i = 0; i < in.size(); i++) {
    uint32_t v = in[i];
    if (v >= 0xd800 && v < 0xdc00 && i + 1 < in.size()) v = 0x10000 + ((v - 0xd800) << 10) + (in[++i] - 0xdc00);
    if (v < 0x80) out += char(v);
    else if (v < 0x800) { out += char(0xc0 | v >> 6); out += char(0x80 | (v & 0x3f)); }
    else if (v < 0x10000) { out += char(0xe0 | v >> 12); out += char(0x80 | ((v >> 6) & 0x3f)); out += char(0x80 | (v & 0x3f)); }
    else { out += char(0xf0 | v >> 18); out += char(0x80 | ((v >> 12) & 0x3f)); out += char(0x80 | ((v >> 6) & 0x3f)); out += char(0x80 | (v & 0x3f)); }
  }
  return out;
}

struct string {
  std::u16string s;
  string() {}
  string(const char *c) : s(widen(c)) {}
  string(const std::string &c) : s(widen(c)) {}
  string(const std::u16string &c) : s(c) {}
  bool operator==(const string &o) const { return s == o.s; }
  bool operator!=(const string &o) const { return s != o.s; }
};
static string operator+(const string &a, const string &b) { return string(a.s + b.s); }
static std::ostream &operator<<(std::ostream &o, const string &x) { return o << narrow(x.s); }

template <class T> struct Array {
  std::vector<T> v;
  T &operator[](long i) {
    if (i < 0 || size_t(i) >= v.size()) { std::cout << "array out of range\n"; std::_Exit(3); }   // as the terminal: ends the program
    return v[size_t(i)];
  }
  const T &operator[](long i) const { return const_cast<Array *>(this)->operator[](i); }
};

enum ENUM_TIMEFRAMES {
  PERIOD_M1 = 1, PERIOD_M2 = 2, PERIOD_M3 = 3, PERIOD_M4 = 4, PERIOD_M5 = 5, PERIOD_M6 = 6, PERIOD_M10 = 10, PERIOD_M12 = 12,
  PERIOD_M15 = 15, PERIOD_M20 = 20, PERIOD_M30 = 30, PERIOD_H1 = 0x4001, PERIOD_H2 = 0x4002, PERIOD_H3 = 0x4003, PERIOD_H4 = 0x4004,
  PERIOD_H6 = 0x4006, PERIOD_H8 = 0x4008, PERIOD_H12 = 0x400c, PERIOD_D1 = 0x4018, PERIOD_W1 = 0x8001, PERIOD_MN1 = 0xc001
};
struct MqlRates { datetime time; double open, high, low, close; long tick_volume; int spread; long real_volume; };
struct MqlDateTime { int year, mon, day, hour, min, sec, day_of_week, day_of_year; };
enum { INIT_SUCCEEDED, INIT_FAILED, INIT_PARAMETERS_INCORRECT = 32767 };
enum { FILE_READ = 1, FILE_WRITE = 2, FILE_BIN = 4, FILE_TXT = 16, FILE_UNICODE = 64, FILE_REWRITE = 512 };
enum { MQL_TESTER, TERMINAL_CONNECTED, TERMINAL_MAXBARS, ACCOUNT_SERVER, SYMBOL_DIGITS, SYMBOL_POINT, SERIES_SYNCHRONIZED };
const int INVALID_HANDLE = -1, WHOLE_ARRAY = -1;
const unsigned CP_UTF8 = 65001;

// --- the terminal that the test drives -----------------------------------------------------------------------------
struct Quote { int digits; std::map<std::pair<int, datetime>, MqlRates> bars; };
struct Terminal {
  std::map<std::string, Quote> symbols;
  std::vector<std::string> watch;
  std::string server = "Broker-Demo", files, sent;
  long gmt = 0, offset = 0, limit = 1 << 30;
  int error = 0, fail = 0, posts = 0, connected = 1, tester = 0, maxbars = 100000, synchronized = 1, lockIn = 0;
  std::string comment;
} terminal;
static std::map<int, std::FILE *> handles;
static std::map<int, std::string> opened;
static int nextHandle = 1;

static std::string under(const string &path) {
  std::string p = narrow(path.s);
  std::replace(p.begin(), p.end(), '\\', '/');
  return terminal.files + "/" + p;
}

template <class T> void show(const T &x) { std::cout << x; }
template <class... A> void Print(const A &...a) { std::cout << "PRINT "; (show(a), ...); std::cout << "\n"; }
template <class... A> void Alert(const A &...a) { std::cout << "ALERT "; (show(a), ...); std::cout << "\n"; }
template <class... A> void Comment(const A &...a) { std::ostringstream o; ((o << a), ...); terminal.comment = o.str(); }

static int GetLastError() { return terminal.error; }
static void ResetLastError() { terminal.error = 0; }
static bool IsStopped() { return false; }
static unsigned long GetTickCount64() { return (unsigned long)terminal.gmt * 1000ul + 1000000ul; }
static datetime TimeGMT() { return terminal.gmt; }
static datetime TimeLocal() { return terminal.gmt; }
static datetime TimeTradeServer() { return terminal.gmt + terminal.offset; }
static bool EventSetTimer(int) { return true; }
static void EventKillTimer() {}
static int MQLInfoInteger(int) { return terminal.tester; }
static int TerminalInfoInteger(int what) { return what == TERMINAL_CONNECTED ? terminal.connected : terminal.maxbars; }
static string AccountInfoString(int) { return terminal.server; }
static int SymbolsTotal(bool) { return int(terminal.watch.size()); }
static string SymbolName(int i, bool) { return terminal.watch[size_t(i)]; }
static bool SymbolSelect(const string &name, bool) { return terminal.symbols.count(narrow(name.s)) > 0; }
static long SymbolInfoInteger(const string &name, int) { return terminal.symbols[narrow(name.s)].digits; }
static double SymbolInfoDouble(const string &name, int) { return std::pow(10.0, -terminal.symbols[narrow(name.s)].digits); }
static long SeriesInfoInteger(const string &, ENUM_TIMEFRAMES, int) { return terminal.synchronized; }
static int PeriodSeconds(ENUM_TIMEFRAMES p) { return p >= 0xc000 ? 2592000 : p >= 0x8000 ? 604800 : p >= 0x4000 ? (p & 0xfff) * 3600 : p * 60; }

static std::vector<MqlRates> series(const string &symbol, ENUM_TIMEFRAMES p) {
  std::vector<MqlRates> out;
  for (auto &[key, bar] : terminal.symbols[narrow(symbol.s)].bars)
    if (key.first == int(p)) out.push_back(bar);
  if (long(out.size()) > terminal.limit) out.erase(out.begin(), out.end() - terminal.limit);
  return out;
}
static int CopyRates(const string &symbol, ENUM_TIMEFRAMES p, int start, int count, Array<MqlRates> &out) {
  auto all = series(symbol, p);
  long stop = long(all.size()) - start, from = std::max(0l, stop - count);
  if (stop <= 0) { terminal.error = 4401; return -1; }
  out.v.assign(all.begin() + from, all.begin() + stop);
  return int(out.v.size());
}
static int CopyRates(const string &symbol, ENUM_TIMEFRAMES p, datetime from, datetime to, Array<MqlRates> &out) {
  out.v.clear();
  for (auto &bar : series(symbol, p)) if (bar.time >= from && bar.time <= to) out.v.push_back(bar);
  if (out.v.empty()) { terminal.error = 4401; return -1; }
  return int(out.v.size());
}

template <class T> int ArraySize(const Array<T> &a) { return int(a.v.size()); }
template <class T> int ArrayResize(Array<T> &a, int n, int = 0) { a.v.resize(size_t(n)); return n; }
template <class T> bool ArraySetAsSeries(Array<T> &, bool) { return true; }
template <class A, class B> auto MathMin(A a, B b) { typedef decltype(a + b) T; return T(a) < T(b) ? T(a) : T(b); }
template <class A, class B> auto MathMax(A a, B b) { typedef decltype(a + b) T; return T(a) > T(b) ? T(a) : T(b); }
static double MathRound(double x) { return std::round(x); }

static int StringLen(const string &x) { return int(x.s.size()); }
static bool StringAdd(string &a, const string &b) { a.s += b.s; return true; }
static int StringFind(const string &x, const string &what, int from = 0) { auto at = x.s.find(what.s, size_t(from)); return at == std::u16string::npos ? -1 : int(at); }
static string StringSubstr(const string &x, int from, int n = -1) {
  if (from < 0 || size_t(from) >= x.s.size()) return string();
  return string(x.s.substr(size_t(from), n < 0 ? std::u16string::npos : size_t(n)));
}
static unsigned short StringGetCharacter(const string &x, int at) { return at >= 0 && size_t(at) < x.s.size() ? x.s[size_t(at)] : 0; }
static string ShortToString(unsigned short c) { return string(std::u16string(1, char16_t(c))); }
static int StringCompare(const string &a, const string &b) { return a.s.compare(b.s); }
static bool blank(char16_t c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }
static int StringTrimLeft(string &x) { size_t n = 0; while (n < x.s.size() && blank(x.s[n])) n++; x.s.erase(0, n); return int(n); }
static int StringTrimRight(string &x) { int n = 0; while (!x.s.empty() && blank(x.s.back())) { x.s.pop_back(); n++; } return n; }
static bool StringToUpper(string &x) { for (auto &c : x.s) if (c < 128) c = char16_t(toupper(c)); return true; }
static bool StringToLower(string &x) { for (auto &c : x.s) if (c < 128) c = char16_t(tolower(c)); return true; }
static int StringSplit(const string &x, char separator, Array<string> &out) {
  out.v.clear();
  size_t at = 0;
  for (;;) {
    auto next = x.s.find(char16_t(separator), at);
    out.v.push_back(string(x.s.substr(at, next == std::u16string::npos ? next : next - at)));
    if (next == std::u16string::npos) return int(out.v.size());
    at = next + 1;
  }
}
static long StringToInteger(const string &x) { return std::strtol(narrow(x.s).c_str(), nullptr, 10); }
static string IntegerToString(long v, int width = 0, char fill = ' ') { std::string t = std::to_string(v); while (int(t.size()) < width) t.insert(0, 1, fill); return t; }
static string DoubleToString(double v, int digits) { char b[64]; std::snprintf(b, sizeof b, "%.*f", digits, v); return b; }
static string StringFormat(const char *f, ...) { char b[256]; va_list a; va_start(a, f); std::vsnprintf(b, sizeof b, f, a); va_end(a); return b; }
static int StringToCharArray(const string &x, Array<char> &out, int, int, unsigned) { std::string t = narrow(x.s); out.v.assign(t.begin(), t.end()); out.v.push_back(0); return int(out.v.size()); }
static string CharArrayToString(const Array<char> &a, int, int n, unsigned) { return std::string(a.v.begin(), a.v.begin() + n); }

static bool TimeToStruct(datetime t, MqlDateTime &p) { time_t x = t; tm m; gmtime_r(&x, &m); p = {m.tm_year + 1900, m.tm_mon + 1, m.tm_mday, m.tm_hour, m.tm_min, m.tm_sec, m.tm_wday, m.tm_yday}; return true; }
static datetime StructToTime(const MqlDateTime &p) { tm m = {}; m.tm_year = p.year - 1900; m.tm_mon = p.mon - 1; m.tm_mday = p.day; m.tm_hour = p.hour; m.tm_min = p.min; m.tm_sec = p.sec; return timegm(&m); }
static string TimeToString(datetime t) { MqlDateTime p; TimeToStruct(t, p); char b[96]; std::snprintf(b, sizeof b, "%04d.%02d.%02d %02d:%02d", p.year, p.mon, p.day, p.hour, p.min); return b; }

static bool FolderCreate(const string &path) { std::error_code e; std::filesystem::create_directories(under(path), e); return !e; }
static bool FileIsExist(const string &path) { return std::filesystem::exists(under(path)); }
static bool FileDelete(const string &path) { return std::filesystem::remove(under(path)); }
static bool FileMove(const string &a, int, const string &b, int mode) {
  if (!(mode & FILE_REWRITE) && FileIsExist(b)) return false;
  std::error_code e;
  std::filesystem::rename(under(a), under(b), e);
  if (e) terminal.error = 5020;
  return !e;
}
static int FileOpen(const string &path, int mode) {
  std::string p = under(path);
  for (auto &[h, name] : opened) if (name == p) { terminal.error = 5004; return INVALID_HANDLE; }
  std::FILE *f = std::fopen(p.c_str(), mode & FILE_WRITE ? "wb" : "rb");
  if (!f) { terminal.error = 5004; return INVALID_HANDLE; }
  handles[nextHandle] = f;
  opened[nextHandle] = p;
  return nextHandle++;
}
static void FileClose(int h) { std::fclose(handles[h]); handles.erase(h); opened.erase(h); }
static void FileFlush(int h) { std::fflush(handles[h]); }
static unsigned long FileSize(int h) { struct stat s; fstat(fileno(handles[h]), &s); return (unsigned long)s.st_size; }
static unsigned FileWriteArray(int h, const Array<char> &a, int, int n) { return unsigned(std::fwrite(a.v.data(), 1, size_t(n), handles[h])); }
static unsigned FileReadArray(int h, Array<char> &a, int, int n) { a.v.resize(size_t(n)); return unsigned(std::fread(a.v.data(), 1, size_t(n), handles[h])); }
static unsigned FileWriteString(int h, const string &x) { std::string t = narrow(x.s); return unsigned(std::fwrite(t.data(), 1, t.size(), handles[h])); }
static bool FileIsEnding(int h) { int c = std::fgetc(handles[h]); if (c == EOF) return true; std::ungetc(c, handles[h]); return false; }
static string FileReadString(int h) { std::string t; int c; while ((c = std::fgetc(handles[h])) != EOF && c != '\n') if (c != '\r') t += char(c); return t; }
static std::map<long, std::vector<std::string>> searches;
static bool FileFindNext(long h, string &name) { auto &left = searches[h]; if (left.empty()) return false; name = left.back(); left.pop_back(); return true; }
static long FileFindFirst(const string &filter, string &name) {
  std::filesystem::path p = under(filter);
  std::vector<std::string> found;   // in no order, as file systems may
  std::error_code e;
  for (auto &entry : std::filesystem::directory_iterator(p.parent_path(), e)) if (entry.path().extension() == p.extension()) found.push_back(entry.path().filename());
  if (found.empty()) return INVALID_HANDLE;
  searches[++nextHandle] = found;
  FileFindNext(nextHandle, name);
  return nextHandle;
}
static void FileFindClose(long h) { searches.erase(h); }

// Plain HTTP/1.1 to the gateway, or the failure that the test asks for.
static int WebRequest(const string &method, const string &url, const string &headers, int timeout, const Array<char> &data, Array<char> &result, string &resultHeaders) {
  std::string body(data.v.begin(), data.v.end());
  char name[32];
  std::snprintf(name, sizeof name, "/%05d.json", ++terminal.posts);
  std::ofstream(terminal.sent + name, std::ios::binary) << body;
  result.v.clear();
  if (terminal.fail) { terminal.error = terminal.fail; return -1; }
  std::string u = narrow(url.s).substr(7), host = u.substr(0, u.find('/')), path = u.substr(u.find('/'));
  sockaddr_in to = {};
  to.sin_family = AF_INET;
  to.sin_port = htons(uint16_t(std::stoi(host.substr(host.find(':') + 1))));
  inet_pton(AF_INET, host.substr(0, host.find(':')).c_str(), &to.sin_addr);
  int s = socket(AF_INET, SOCK_STREAM, 0);
  timeval wait = {timeout / 1000, 0};
  setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
  if (connect(s, reinterpret_cast<sockaddr *>(&to), sizeof to) != 0) { close(s); terminal.error = 5201; return -1; }
  std::string out = narrow(method.s) + " " + path + " HTTP/1.1\r\nHost: " + host + "\r\n" + narrow(headers.s) + "Content-Length: " + std::to_string(body.size()) + "\r\nConnection: close\r\n\r\n" + body;
  for (size_t at = 0; at < out.size();) {
    ssize_t n = send(s, out.data() + at, out.size() - at, MSG_NOSIGNAL);
    if (n <= 0) break;
    at += size_t(n);
  }
  std::string in;
  char buffer[65536];
  for (ssize_t n; (n = recv(s, buffer, sizeof buffer, 0)) > 0;) in.append(buffer, size_t(n));
  close(s);
  auto end = in.find("\r\n\r\n");
  if (end == std::string::npos) { terminal.error = 5203; return -1; }
  resultHeaders = in.substr(0, end + 2);
  result.v.assign(in.begin() + long(end) + 4, in.end());
  return std::stoi(in.substr(9, 3));
}

static std::string given(const char *name, const std::string &otherwise) { const char *v = std::getenv(name); return v ? v : otherwise; }
static string input_of(const char *name, const char *otherwise) { return given(name, otherwise); }
static int input_of(const char *name, int otherwise) { return std::stoi(given(name, std::to_string(otherwise))); }
static bool input_of(const char *name, bool otherwise) { return given(name, otherwise ? "1" : "0") == "1"; }
