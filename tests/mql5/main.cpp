// Reads commands on stdin, one a line, and answers each with what the EA printed and then "DONE ...".
int OnInit();
void OnDeinit(const int reason);
void OnTimer();

int main(int, char **argv) {
  terminal.files = argv[1];
  terminal.sent = argv[2];
  std::string line;
  while (std::getline(std::cin, line)) {
    std::vector<std::string> w;
    std::stringstream in(line);
    for (std::string x; std::getline(in, x, '\t');) w.push_back(x);
    const std::string &c = w[0];
    long result = 0;
    if (c == "symbol") { terminal.symbols[w[1]].digits = std::stoi(w[2]); terminal.watch.push_back(w[1]); }
    else if (c == "bar") {
      MqlRates r = {std::stol(w[3]), std::stod(w[4]), std::stod(w[5]), std::stod(w[6]), std::stod(w[7]), std::stol(w[8]), std::stoi(w[9]), std::stol(w[10])};
      terminal.symbols[w[1]].bars[{std::stoi(w[2]), r.time}] = r;
    }
    else if (c == "nobar") terminal.symbols[w[1]].bars.erase({std::stoi(w[2]), std::stol(w[3])});
    else if (c == "clock") { terminal.gmt = std::stol(w[1]); terminal.offset = std::stol(w[2]); }
    else if (c == "fail") terminal.fail = std::stoi(w[1]);
    else if (c == "limit") terminal.limit = std::stol(w[1]);
    else if (c == "maxbars") terminal.maxbars = std::stoi(w[1]);
    else if (c == "synchronized") terminal.synchronized = std::stoi(w[1]);
    else if (c == "connected") terminal.connected = std::stoi(w[1]);
    else if (c == "tester") terminal.tester = std::stoi(w[1]);
    else if (c == "server") terminal.server = w.size() > 1 ? w[1] : "";
    else if (c == "init") result = OnInit();
    else if (c == "timer") OnTimer();
    else if (c == "deinit") OnDeinit(0);
    else { std::cout << "unknown command " << c << "\n"; return 2; }
    std::cout << "DONE " << result << std::endl;
  }
  return 0;
}
